"""The retinal OCT images of Kermany et al. (OCT2017), Table 5 of arXiv 2011.11108."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, ClassVar

from kd_multiresolution.data.one_class_folder import OneClassFolder

logger = logging.getLogger(__name__)

_NORMAL = "NORMAL"
_CLASSES = frozenset({_NORMAL, "CNV", "DME", "DRUSEN"})
# Normal training images of the published versions: 2 (and Kaggle's copy), 3.
_PUBLISHED = (26_315, 51_140)


class RetinalOCT(OneClassFolder):
    """OCT2017: trains on ``train/NORMAL``, tests on all of ``test/{NORMAL,CNV,DME,DRUSEN}``.

    The layout is the archive's own; the folder ``OCT2017`` it unpacks to (``"OCT2017 "`` in Kaggle's copy) may be the
    root or lie below it. Only these five folders are listed, never the 57,000 diseased training images. Test images
    whose file name (disease, patient, number) is a training image's too are reported, not refused: they are in the
    published split.

    Args:
        root: the folder of ``train`` and ``test``, or the one above it.
        **kwargs: the arguments of :class:`CheckedDataModule`; Kaggle's copy has 32 images in ``val`` for
            ``val_split_mode="from_dir"``.

    Raises:
        TypeError: if an argument has another type.
        ValueError: if an argument is out of range; on setup, if one file is in training and test set.
        FileNotFoundError: on setup, if a folder or its images are missing.

    Example:
        >>> datamodule = RetinalOCT(root="datasets/RetinalOCT", eval_batch_size=64)
    """

    source: ClassVar[str] = (
        "Expected train/NORMAL and test/{NORMAL,CNV,DME,DRUSEN} of OCT2017: "
        "https://data.mendeley.com/datasets/rscbjbr9sj/2 or https://www.kaggle.com/datasets/paultimothymooney/kermany2018"
    )

    def __init__(self, root: Path | str = "./datasets/RetinalOCT", **kwargs: Any) -> None:
        super().__init__(root, _NORMAL, **kwargs)

    def _setup(self, _stage: str | None = None) -> None:
        candidates = (self.root, self.root / "OCT2017", self.root / "OCT2017 ")
        self.root = next((folder for folder in candidates if (folder / "train").is_dir()), self.root)
        missing = _CLASSES - set(self._classes("test"))
        if missing:
            msg = f"{self.root / 'test'}: {', '.join(sorted(missing))} missing, half-unpacked? {self.source}"
            raise FileNotFoundError(msg)
        super()._setup(_stage)
        train = len(self.train_data)
        if train not in _PUBLISHED:
            logger.warning(
                "%s holds %d images; the published versions hold %s. The archive may be half-unpacked.",
                self.root / "train" / _NORMAL,
                train,
                " or ".join(f"{count:,}" for count in _PUBLISHED),
            )

    def _report_copies(self, train: list[str], test: list[str]) -> None:
        # By name, since reading all the files would make for a slow start.
        train_names = {Path(path).name for path in train}
        shared = [path for path in test if Path(path).name in train_names]
        if shared:
            logger.warning(
                "%d of %d test images have the file name of a training image, the first is %s.",
                len(shared),
                len(test),
                shared[0],
            )
