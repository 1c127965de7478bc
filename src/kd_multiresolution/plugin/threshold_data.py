"""The data that thresholds were told from, so that a later test can say what its figures at them are worth."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from anomalib.data import AnomalibDataModule

from kd_multiresolution.plugin.image_files import image_files

MOST = 1000  # images that are known again: of more, those whose hashes are the lowest
PARTS = ("train_data", "val_data", "test_data")


@dataclass(frozen=True)
class ThresholdData:
    """A data module whose validation images thresholds are told from.

    Attributes:
        split: where these come from, one of anomalib's ``ValSplitMode``; empty if that is not known.
        images: hashes of the paths of its images, ascending.
    """

    split: str = ""
    images: tuple[int, ...] = ()

    @classmethod
    def of(cls, data: object) -> ThresholdData:
        """Return what is to be kept of what a trainer was given, after its setup."""
        if not isinstance(data, AnomalibDataModule):
            return cls()
        return cls(data.val_split_mode.value, tuple(heapq.nsmallest(MOST, _hashes(data))))

    def is_tested(self, data: object) -> bool:
        """Return whether a data module has any of these images; so it is where neither knows paths.

        Their split may be drawn anew with every setup, so that those of validation alone are no sign.
        """
        return not self.images or (isinstance(data, AnomalibDataModule) and not _hashes(data).isdisjoint(self.images))

    def entry(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {**asdict(self), "images": [*self.images]}

    @classmethod
    def of_entry(cls, entry: Mapping[str, Any] | None) -> ThresholdData | None:
        """Return what :meth:`entry` gave; ``None`` of nothing: older checkpoints do not say."""
        return None if entry is None else cls(entry["split"], tuple(entry["images"]))


def _hashes(data: AnomalibDataModule) -> set[int]:
    paths = {path for part in PARTS for path in image_files(getattr(data, part, None))}
    return {
        int.from_bytes(hashlib.sha256(path.encode("utf-8", "surrogateescape")).digest()[:7], "big") for path in paths
    }
