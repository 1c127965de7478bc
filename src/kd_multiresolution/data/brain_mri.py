"""The brain MRI images of Table 6 of arXiv 2011.11108."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from kd_multiresolution.data.base import list_images
from kd_multiresolution.data.held_out_normals import HeldOutNormals

logger = logging.getLogger(__name__)


class BrainMRI(HeldOutNormals):
    """Brain MRI images for brain tumour detection (N. Chakrabarty): 98 without and 155 with a tumour.

    Trains on 88 normal images, tests on the other 10 and all 155. The validation set is by default the test set, so
    that both stay whole; thresholds then come from test labels, as with anomalib's ``MVTecAD``. The published files
    hold copies of each other: those that a split puts into training and test set are reported, not refused, since
    the paper's random split holds them as well.

    Args:
        root: the folder of ``yes`` and ``no``, or the one above their common folder ``brain_tumor_dataset``.
        split_seed: draws the ten normal test images; a split depends on it and the file names alone.
        **kwargs: the arguments of :class:`CheckedDataModule`.

    Raises:
        TypeError: if an argument has another type.
        ValueError: if an argument is out of range, or the split mode is ``from_dir`` for the validation set.
        FileNotFoundError: on setup, if a folder or its images are missing.

    Example:
        >>> datamodule = BrainMRI(root="datasets/BrainMRI", split_seed=3)
    """

    def __init__(self, root: Path | str = "./datasets/BrainMRI", split_seed: int = 0, **kwargs: Any) -> None:
        super().__init__(root, split_seed, **kwargs)

    def _find_images(self) -> tuple[list[str], list[str]]:
        folders = (self.root, self.root / "brain_tumor_dataset")
        folder = next((f for f in folders if (f / "no").is_dir() or (f / "yes").is_dir()), self.root)
        found = {name: list(list_images(folder / name)) for name in ("no", "yes")}
        if missing := [name for name, paths in found.items() if not paths]:
            msg = (
                f"{folder}: no image in {' and '.join(missing)}. Expected yes/ (155 images with a tumour) and no/ (98 "
                "without) of https://www.kaggle.com/datasets/navoneel/brain-mri-images-for-brain-tumor-detection"
            )
            raise FileNotFoundError(msg)
        counts = (len(found["no"]), len(found["yes"]))
        if counts != (98, 155):
            logger.warning("%s: %d images in no and %d in yes; published are 98 and 155.", folder, *counts)
        return found["no"], found["yes"]
