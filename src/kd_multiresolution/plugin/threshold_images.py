"""Which images thresholds were told from, so that a later test can say what its figures at them are worth."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from anomalib.data import AnomalibDataModule


@dataclass(frozen=True)
class ThresholdImages:
    """The validation images of a data module; of nothing known, both are empty.

    Attributes:
        split: where they come from, one of anomalib's ``ValSplitMode``.
        names: SHA-256 of their files' names.
    """

    split: str = ""
    names: str = ""

    @classmethod
    def of_data(cls, data: object) -> ThresholdImages:
        """Return those of what a trainer was given, after its setup."""
        if not isinstance(data, AnomalibDataModule) or not hasattr(data, "val_data"):
            return cls()
        names = "\n".join(sorted(map(str, data.val_data.samples["image_path"])))
        return cls(str(data.val_split_mode.value), hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest())

    @classmethod
    def of_entry(cls, entry: Mapping[str, str] | None) -> ThresholdImages:
        """Return what a checkpoint keeps of them; older ones keep nothing."""
        return cls() if entry is None else cls(**entry)
