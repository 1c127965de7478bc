"""What every one-class data module here shares: the data set without masks, the splits, the listing of folders."""

from __future__ import annotations

import hashlib
import logging
import os
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from anomalib import TaskType
from anomalib.data import AnomalibDataset, ImageItem
from anomalib.data.utils import LabelName, Split, TestSplitMode
from pandas import DataFrame
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2.functional import to_dtype, to_image

from kd_multiresolution.data.arguments import CheckedDataModule
from kd_multiresolution.plugin.image_content import check_depth, check_single
from kd_multiresolution.plugin.image_files import READING_ERRORS

logger = logging.getLogger(__name__)


class OneClassDataset(AnomalibDataset):
    """Images with a label each and no mask; label 0 is the normal class.

    Args:
        samples: one row per image with ``image_path`` (str), ``split``, ``label`` (str), ``label_index`` (0 or 1) and
            ``class_name`` (str); see :func:`sample_rows`.
    """

    def __init__(self, samples: DataFrame) -> None:
        super().__init__()
        self.samples = samples

    @property
    def samples(self) -> DataFrame:
        """The rows, in the order of the images."""
        return self._rows

    @samples.setter
    def samples(self, samples: DataFrame) -> None:
        # anomalib's setter asks the disk for each file, once per split: slow for tens of thousands that were just
        # listed, wrong for images that exist in memory only.
        self._rows = samples.reset_index(drop=True)

    @property
    def task(self) -> TaskType:
        """Classification: there are no masks."""
        return TaskType.CLASSIFICATION

    def field(self, index: int, column: str) -> Any:
        """Return one value of a row of :attr:`samples`."""
        return self.samples[column].iloc[index]

    @abstractmethod
    def read(self, index: int) -> Tensor:
        """Return the image of a row as a (3, H, W) float tensor in [0, 1], not augmented."""

    def __getitem__(self, index: int) -> ImageItem:
        """Return the augmented image of a row with its label and path."""
        image = self.read(index)
        if self.augmentations:
            image = self.augmentations(image)
        return ImageItem(
            image=image,
            gt_label=torch.tensor(int(self.field(index, "label_index"))),
            image_path=self.field(index, "image_path"),
        )


class ImageFiles(OneClassDataset):
    """A one-class data set of files, read when they are asked for."""

    def read(self, index: int) -> Tensor:
        """Return the image of a row as a (3, H, W) float tensor in [0, 1], not augmented.

        Grey, palette, CMYK and alpha images become RGB exactly as in anomalib's predictions for single files: alpha is
        dropped, so that a file has one score however it is read.

        Raises:
            OSError: if the file cannot be decoded, has more than eight bits per channel or holds several pictures; the
                message names it.
        """
        path: str = self.field(index, "image_path")
        try:
            with Image.open(path) as image:
                check_depth(image)
                check_single(image)
                rgb = to_image(image.convert("RGB"))
        except (*READING_ERRORS, ValueError) as error:
            msg = f"{path}: not a readable image ({error}). Replace the file, or take it out of the folder."
            raise OSError(msg) from error
        pixels: Tensor = to_dtype(rgb, torch.float32, scale=True)
        return pixels


class OneClassDataModule(CheckedDataModule):
    """Base of the one-class data modules: test images stay in the order in which the set brings them.

    Args:
        **kwargs: the arguments of :class:`CheckedDataModule`.

    Raises:
        TypeError: if an argument has another type.
        ValueError: if an argument is out of range, or the data set cannot serve a split mode.
    """

    def _create_test_split(self) -> None:
        # anomalib's takes the normal images out and appends them again. The sets here bring their own, so that the
        # test set can stay as it is: the first batches of MNIST's are mixed, as a shortened run wants them.
        if self.test_split_mode != TestSplitMode.FROM_DIR:
            super()._create_test_split()


def sample_rows(paths: Sequence[str], class_names: Sequence[str], normal_class: str, split: Split) -> DataFrame:
    """Return the rows of a :class:`OneClassDataset`.

    Args:
        paths: one per image.
        class_names: the class of each image.
        normal_class: the class with label 0; all others have label 1.
        split: the split of all of them.
    """
    anomalous = [name != normal_class for name in class_names]
    return DataFrame(
        {
            "image_path": list(paths),
            "split": split,
            "label": [LabelName.ABNORMAL.name.lower() if a else LabelName.NORMAL.name.lower() for a in anomalous],
            "label_index": [int(a) for a in anomalous],
            "class_name": list(class_names),
            "mask_path": "",  # a column anomalib's synthetic anomalies ask for
        },
    )


def find_class(normal_class: int | str, names: Sequence[str]) -> int:
    """Return the position in ``names`` of a class given by name or by number.

    Case does not matter unless two names differ in nothing else; blanks and slashes count as underscores.

    Raises:
        ValueError: if there is no such class; the message lists those there are.

    Example:
        >>> names = ["ankle_boot", "bag"]
        >>> find_class("Ankle boot", names), find_class(1, names)
        (0, 1)
    """
    wanted = str(normal_class)
    if wanted in names:  # a folder may be called "3": the name wins over the number
        return names.index(wanted)
    plain = [_plain(name) for name in names]
    if plain.count(_plain(wanted)) == 1:
        return plain.index(_plain(wanted))
    if wanted.isdecimal() and int(wanted) < len(names):
        return int(wanted)
    known = ", ".join(f"{number} {name}" for number, name in enumerate(names))
    msg = f"normal_class={normal_class!r}: expected the number or the name of one of: {known}."
    raise ValueError(msg)


def _plain(name: str) -> str:
    return name.lower().replace(" ", "_").replace("/", "_")


def list_images(folder: Path) -> dict[str, str]:
    """Return the image files right below a folder, sorted by name, each with the file it really is.

    A scan of the directory alone: no file is opened, and only symbolic links are looked at one by one. Hidden files
    (``.DS_Store``, ``._name.jpeg`` of archives packed on a Mac) are left out.

    Returns:
        Path by path the path with links resolved; empty if the folder holds no image or does not exist.
    """
    if not folder.is_dir():
        return {}
    real_folder = os.path.realpath(folder)
    with os.scandir(folder) as entries:
        found = [
            (entry.path, os.path.realpath(entry.path) if entry.is_symlink() else f"{real_folder}{os.sep}{entry.name}")
            for entry in entries
            if not entry.name.startswith(".") and entry.name.lower().endswith(IMG_EXTENSIONS)
        ]
    return dict(sorted(found))


def report_copies(train: Sequence[str], test: Sequence[str]) -> None:
    """Log which test images are byte for byte a training image; the first five by name."""
    sizes = {path: Path(path).stat().st_size for path in (*train, *test)}
    common = {sizes[path] for path in train} & {sizes[path] for path in test}  # only such files need to be read
    candidates = ([path for path in paths if sizes[path] in common] for paths in (train, test))
    digests = ({path: digest(Path(path).read_bytes()) for path in paths} for paths in candidates)
    report_equal(*digests, count=len(test))


def report_equal(train: Mapping[str, bytes], test: Mapping[str, bytes], *, count: int) -> None:
    """Log which test images have the digest of a training image; the first five by name.

    Args:
        train: digests of training images by path.
        test: of test images.
        count: number of all test images.
    """
    originals = {digest: path for path, digest in train.items()}
    copies = [(path, originals[digest]) for path, digest in test.items() if digest in originals]
    if copies:
        logger.warning(
            "%d of %d test images are copies of training images: %s%s.",
            len(copies),
            count,
            ", ".join(f"{Path(copy).name} = {Path(original).name}" for copy, original in copies[:5]),
            ", ..." if len(copies) > 5 else "",
        )


def digest(content: bytes) -> bytes:
    """Return what tells contents apart."""
    return hashlib.blake2b(content, digest_size=16).digest()
