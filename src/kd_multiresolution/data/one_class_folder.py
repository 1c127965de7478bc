"""Any folder of classes as a one-class task."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from anomalib.data.utils import Split, ValSplitMode

from kd_multiresolution.data.arguments import check_data_arguments
from kd_multiresolution.data.base import (
    ImageFiles,
    OneClassDataModule,
    find_class,
    list_images,
    report_copies,
    sample_rows,
)


class OneClassFolder(OneClassDataModule):
    """One class of a folder of classes is normal, all others are anomalous.

    Expects ``train/<class>/*`` and ``test/<class>/*`` below the root, and ``val/<class>/*`` for
    ``val_split_mode="from_dir"``. Trains on the normal class of ``train``, tests on all of ``test``. The validation set
    is by default the test set, so that training and test sets stay whole; thresholds then come from test labels, as
    with anomalib's ``MVTecAD``. ``from_train`` keeps them honest at the cost of training images. Test images that are
    copies of training images are reported.

    Args:
        root: the folder of ``train`` and ``test``.
        normal_class: name of the normal class, or its number in the sorted names of ``test``.
        **kwargs: the arguments of :class:`CheckedDataModule`.

    Raises:
        TypeError: if an argument has another type.
        ValueError: if an argument is out of range; on setup, if the class is unknown or one file is in training and
            test set.
        FileNotFoundError: on setup, if a folder or the images of a class are missing.

    Example:
        >>> datamodule = OneClassFolder(root="datasets/cifar10_jpg", normal_class="cat")
    """

    # Where to get the data, for the messages about what is missing.
    source: ClassVar[str] = "Expected train/<class>/ and test/<class>/ below it."

    def __init__(self, root: Path | str, normal_class: int | str = 0, **kwargs: Any) -> None:
        check_data_arguments(OneClassFolder.__init__, locals())
        super().__init__(**kwargs)
        self.root = Path(root)
        self.normal_class = normal_class
        # The results folder is named before the data are looked at, so a number stays a number there.
        self.category = str(normal_class)

    def _setup(self, _stage: str | None = None) -> None:
        names = self._classes("test")
        normal = names[find_class(self.normal_class, names)]
        train = list_images(self.root / "train" / normal)
        if not train:
            msg = f"{self.root / 'train' / normal}: no training image of the normal class. {self.source}"
            raise FileNotFoundError(msg)
        test = self._list("test", names, normal)
        real_train = set(train.values())
        shared = [path for paths in test.values() for path, real in paths.items() if real in real_train]
        if shared:
            msg = f"{len(shared)} test images are training images by another path, the first is {shared[0]}."
            raise ValueError(msg)
        self._report_copies(list(train), [path for paths in test.values() for path in paths])
        self.train_data = ImageFiles(sample_rows(list(train), [normal] * len(train), normal, Split.TRAIN))
        self.test_data = _labelled(test, normal, Split.TEST)
        if self.val_split_mode == ValSplitMode.FROM_DIR:
            self.val_data = _labelled(self._list("val", self._classes("val"), normal), normal, Split.VAL)

    def _report_copies(self, train: list[str], test: list[str]) -> None:
        report_copies(train, test)

    def _classes(self, split: str) -> list[str]:
        """Return the class folders of a split, sorted."""
        folder = self.root / split
        if not folder.is_dir():
            msg = f"{folder}: no such folder. {self.source}"
            raise FileNotFoundError(msg)
        return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))

    def _list(self, split: str, names: list[str], normal: str) -> dict[str, dict[str, str]]:
        """Return the images of each class of a split, which needs normal and anomalous ones."""
        found = {name: list_images(self.root / split / name) for name in names}
        if empty := [name for name, paths in found.items() if not paths]:
            msg = f"{self.root / split}: no image in {', '.join(empty)}; is the archive half-unpacked? {self.source}"
            raise FileNotFoundError(msg)
        if normal not in found or len(found) == 1:
            msg = f"{self.root / split}: found {names}; expected {normal!r} and at least one other class. {self.source}"
            raise FileNotFoundError(msg)
        return found


def _labelled(found: dict[str, dict[str, str]], normal: str, split: Split) -> ImageFiles:
    """Return the data set of all classes of a split."""
    class_names = [name for name, paths in found.items() for _ in paths]
    return ImageFiles(sample_rows([path for paths in found.values() for path in paths], class_names, normal, split))
