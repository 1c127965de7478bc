"""Our model beside anomalib's others, on the same images, backbone, size and machine: see ``benchmarks/peers.py``."""
