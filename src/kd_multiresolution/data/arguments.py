"""Checks of the arguments that the data modules share, before any file is looked at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any, cast

from anomalib.data.utils import TestSplitMode, ValSplitMode

from kd_multiresolution.plugin.arguments import check_seed, check_types

SMALLEST = {"train_batch_size": 1, "eval_batch_size": 1, "num_workers": 0, "pictures_per_class": 0}
MODES: dict[str, type[Enum]] = {"test_split_mode": TestSplitMode, "val_split_mode": ValSplitMode}


def check_data_arguments(constructor: Callable[..., None], given: Mapping[str, object]) -> None:
    """Check the arguments of a data module's constructor.

    anomalib looks at most of them when the first batch is read, or never.

    Args:
        constructor: the data module's.
        given: the arguments by name.

    Raises:
        TypeError: if one has another type than is written beside it.
        ValueError: if one is out of range.
    """
    check_types(constructor, given)
    values = cast("Mapping[str, Any]", given)
    for name in SMALLEST.keys() & values.keys():
        if values[name] < SMALLEST[name]:
            msg = f"{name}={values[name]!r}: expected {SMALLEST[name]} or more."
            raise ValueError(msg)
    for name in ("val_split_ratio", "test_split_ratio"):
        if name in values and not 0 < values[name] < 1:
            msg = f"{name}={values[name]!r}: expected a part of the images, above 0 and below 1."
            raise ValueError(msg)
    for name in ("seed", "split_seed"):
        if values.get(name) is not None:
            check_seed(name, values[name])
    for name, modes in MODES.items():
        choices = [mode.value for mode in modes]
        if values[name] not in choices:
            msg = f"{name}={values[name]!r}: expected one of {', '.join(choices)}."
            raise ValueError(msg)
