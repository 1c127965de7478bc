"""The transcribed tables against themselves: means, and the figures that the paper prints more than once."""

from __future__ import annotations

import statistics
from decimal import Decimal

import pytest

from kd_multiresolution.results.published import Row, published_tables

TABLES = published_tables()
# Rows whose printed mean is not that of their values; the tables' notes say so.
SLIPS = {("2 cifar10", "CapsNetPP"), ("7", "TheLast2")}
ROWS = [(name, row) for name, table in TABLES.items() for row in table.rows]


def half_unit(number: float) -> float:
    """Half of the last printed digit."""
    return 0.5 * 10.0 ** min(Decimal(str(number)).as_tuple().exponent, 0)


def agree(first: float, second: float) -> bool:
    """Whether two printed figures may be the same number, rounded differently."""
    return abs(first - second) <= half_unit(first) + half_unit(second) + 1e-9


def test_all_tables_are_there_and_rectangular() -> None:
    assert list(TABLES) == ["1", "2 mnist", "2 fashion_mnist", "2 cifar10", *map(str, range(3, 12))]
    for name, row in ROWS:
        assert len(row.values) == len(TABLES[name].columns), (name, row.method)
        assert row.spread is None or len(row.spread) == len(row.values)
        assert all(value is None or 25 < value < 100 for value in row.values)
    assert [len(table.rows) for table in TABLES.values()] == [6, 10, 7, 12, 10, 6, 10, 5, 3, 3, 5, 5, 6]


@pytest.mark.parametrize(("name", "row"), ROWS, ids=[f"{name} {row.method}" for name, row in ROWS])
def test_mean_columns(name: str, row: Row) -> None:
    if row.mean is None:
        assert name in {"1", "5", "6"}, "these have no mean column"
        return
    # Every value may be off by half of its last digit, which is that of the most precise value: zeros are not printed.
    slack = min(half_unit(value) for value in row.values) + half_unit(row.mean) + 1e-9
    difference = abs(statistics.fmean(row.values) - row.mean)
    if (name, row.method) in SLIPS:
        assert difference > slack
        assert any(row.method in note for note in TABLES[name].notes)
    else:
        assert difference <= slack


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("2 mnist", "OURS"), ("8", "TheLast3")),
        (("2 cifar10", "OURS"), ("10", "Total Loss")),
        (("2 cifar10", "OURS"), ("10", "Smaller Net")),
        (("3", "OURS"), ("9", "Total Loss")),
        (("3", "OURS"), ("9", "SmallerNet")),
        (("4", "OURS"), ("11", "Gradients + Gaussian")),
    ],
)
def test_figures_that_are_printed_twice(first: tuple[str, str], second: tuple[str, str]) -> None:
    by_column = [
        dict(zip(TABLES[t].columns, TABLES[t].row(method).values, strict=True)) for t, method in (first, second)
    ]
    assert by_column[0].keys() == by_column[1].keys()
    assert all(agree(value, by_column[1][column]) for column, value in by_column[0].items())


def test_table_1_has_the_means_of_table_11_save_the_one_that_its_note_names() -> None:
    differ = [row.method for row in TABLES["1"].rows if row.values[0] != TABLES["11"].row(row.method).mean]
    assert differ == ["Gradients + Gaussian"]
    assert "90.51" in TABLES["1"].notes[0]


def test_table_7_has_its_last_row_in_the_order_of_table_3_as_its_note_says() -> None:
    last, ours = TABLES["7"].row("TheLast4").values, TABLES["3"].row("OURS").values
    # Table 3 prints 89.19, 98.37 and the like with one digit more.
    assert [agree(a, b) for a, b in zip(last, ours, strict=True)].count(False) <= 1
    assert "column order of Table 3" in TABLES["7"].notes[0]


def test_unknown_method_is_refused_by_name() -> None:
    with pytest.raises(KeyError, match=r"method='WE': expected one of .*OURS"):
        TABLES["6"].row("WE")
