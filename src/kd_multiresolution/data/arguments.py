"""The arguments that all data modules here share, and their checks, before any file is looked at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, ClassVar

from anomalib.data import AnomalibDataModule
from anomalib.data.utils import TestSplitMode, ValSplitMode
from lightning.pytorch.utilities.types import EVAL_DATALOADERS
from torchvision.transforms.v2 import Transform

from kd_multiresolution.plugin.arguments import check_seed, check_types

SMALLEST = {"train_batch_size": 1, "eval_batch_size": 1, "num_workers": 0, "pictures_per_class": 0}
MODES: dict[str, type[Enum]] = {"test_split_mode": TestSplitMode, "val_split_mode": ValSplitMode}


def check_data_arguments(constructor: Callable[..., None], given: Mapping[str, object]) -> None:
    """Check the arguments that a data module's constructor names; those in ``kwargs`` are checked where they are named.

    anomalib looks at most of them when the first batch is read, or never.

    Args:
        constructor: the data module's.
        given: its ``locals()``.

    Raises:
        TypeError: if one has another type than is written beside it.
        ValueError: if one is out of range.
    """
    values: dict[str, Any] = {name: value for name, value in given.items() if name != "kwargs"}
    check_types(constructor, values)
    for name in SMALLEST.keys() & values.keys():
        if values[name] < SMALLEST[name]:
            msg = f"{name}={values[name]!r}: expected {SMALLEST[name]} or more."
            raise ValueError(msg)
    if not 0 < values.get("val_split_ratio", 0.5) < 1:
        msg = f"val_split_ratio={values['val_split_ratio']!r}: expected a part of the images, above 0 and below 1."
        raise ValueError(msg)
    for name in ("seed", "split_seed"):
        if values.get(name) is not None:
            check_seed(name, values[name])
    for name, modes in MODES.items():
        choices = [mode.value for mode in modes]
        if name in values and values[name] not in choices:
            msg = f"{name}={values[name]!r}: expected one of {', '.join(choices)}."
            raise ValueError(msg)


class CheckedDataModule(AnomalibDataModule):
    """Base of the data modules: anomalib's, with the arguments that all of them take, checked.

    A data module's constructor names its own arguments and those of these that have another default there, and hands
    the rest on as ``**kwargs``; the command line follows them here.

    Args:
        train_batch_size: images per training step.
        eval_batch_size: images per validation, test and prediction step.
        num_workers: loader processes; 0 reads in the main process.
        train_augmentations: transform of training images.
        val_augmentations: transform of validation images.
        test_augmentations: transform of test images.
        augmentations: transform for the three stages that name none of their own.
        test_split_mode: ``from_dir`` tests on the data set's own test images; ``none`` on its anomalous ones alone;
            ``synthetic``, where images are files, on its normal ones, half of them with artificial defects.
        val_split_mode: ``same_as_test`` (thresholds from test labels; training and test set stay whole),
            ``from_train``, ``from_test`` or ``none``; ``from_dir`` where there is a validation folder, ``synthetic``
            where images are files.
        val_split_ratio: part of the images, in (0, 1), that ``from_train``, ``from_test`` and ``synthetic`` take.
        seed: seed of the validation split.

    Raises:
        TypeError: if an argument has another type, or there is none of that name.
        ValueError: if an argument is out of range, or the data set cannot serve a split mode.
    """

    # Why the data set cannot serve a mode, by mode.
    refused_split_modes: ClassVar[dict[str, str]] = {}

    def __init__(
        self,
        *,
        train_batch_size: int = 32,
        eval_batch_size: int = 32,
        num_workers: int = 8,
        train_augmentations: Transform | None = None,
        val_augmentations: Transform | None = None,
        test_augmentations: Transform | None = None,
        augmentations: Transform | None = None,
        test_split_mode: TestSplitMode | str = TestSplitMode.FROM_DIR,
        val_split_mode: ValSplitMode | str = ValSplitMode.SAME_AS_TEST,
        val_split_ratio: float = 0.1,
        seed: int | None = None,
        **unknown: object,
    ) -> None:
        if unknown:  # Python would name this class, which nobody has called
            msg = f"{type(self).__name__}.__init__() got an unexpected keyword argument {next(iter(unknown))!r}"
            raise TypeError(msg)
        check_data_arguments(CheckedDataModule.__init__, locals())
        super().__init__(
            train_batch_size=train_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            train_augmentations=train_augmentations,
            val_augmentations=val_augmentations,
            test_augmentations=test_augmentations,
            augmentations=augmentations,
            test_split_mode=test_split_mode,
            val_split_mode=val_split_mode,
            val_split_ratio=val_split_ratio,
            seed=seed,
        )
        modes = {"val_split_mode": self.val_split_mode.value}
        if self.test_split_mode == TestSplitMode.SYNTHETIC:
            modes["test_split_mode"] = TestSplitMode.SYNTHETIC.value
        for argument, mode in modes.items():
            if mode in self.refused_split_modes:
                msg = f"{argument}={mode!r}: {type(self).__name__} {self.refused_split_modes[mode]}."
                raise ValueError(msg)

    def val_dataloader(self) -> EVAL_DATALOADERS:
        """Return the validation loader, or none at all with ``val_split_mode="none"``, where anomalib's fit crashes."""
        return super().val_dataloader() if hasattr(self, "val_data") else []
