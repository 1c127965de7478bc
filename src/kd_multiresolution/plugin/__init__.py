"""What makes a model anomalib's: how it is found, what it takes and refuses, its scores, checkpoints and exports.

``module`` is what both Lightning modules share of it; the other modules are its parts, and know nothing of the models.
"""
