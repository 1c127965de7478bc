"""The sets of BMAD that have no masks, OCT2017 among them."""

from __future__ import annotations

from anomalib import TaskType
from anomalib.data import BMAD


class BMADWithoutMasks(BMAD):
    """anomalib's BMAD for ``Retina_OCT2017``, ``Chest`` and ``Histopathology``; arguments as there.

    anomalib 2.7 takes these for sets with masks and fails at their first anomalous image. Here every set is one of
    images and labels; ``Retina_RESC``, ``Brain`` and ``Liver``, which have masks, are better read with ``BMAD``.

    Example:
        >>> datamodule = BMADWithoutMasks(root="datasets/BMAD", category="Retina_OCT2017")
    """

    def _setup(self, _stage: str | None = None) -> None:
        super()._setup(_stage)
        for name in ("train_data", "val_data", "test_data"):
            if hasattr(self, name):
                getattr(self, name).samples.attrs["task"] = TaskType.CLASSIFICATION.value
