"""What ``benchmarks/reproduce.py`` is made of: tables, one experiment, its results, their rendering."""
