"""What normal images were like when a model was trained: their scores, and what the pictures themselves are like.

A checkpoint keeps it as plain numbers, of bounded size, beside the weights. Exported models go without it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

MOST = 1000  # numbers that are kept of a distribution
FRESH = "good images of the threshold"  # whose scores are kept once it was set again


@dataclass(frozen=True)
class LearntNormals:
    """Distributions that later images can be held against; whatever is not known is empty.

    Attributes:
        origin: which images have the scores, in words.
        scores: raw scores of normal images that the model has not learnt from, ascending.
        pictures: what normal images are like, by the names of :mod:`kd_multiresolution.plugin.pictures`, ascending.
    """

    origin: str = ""
    scores: tuple[float, ...] = ()
    pictures: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def percentile(self, score: float) -> float | None:
        """Return the percentage of these normal images with a raw score no higher, 0 to 100; ``None``: none is known.

        Example:
            >>> LearntNormals(scores=(1.0, 2.0, 3.0, 4.0)).percentile(2.5)
            50.0
        """
        return 100 * bisect_right(self.scores, score) / len(self.scores) if self.scores else None

    def entry(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            **asdict(self),
            "scores": [*self.scores],
            "pictures": {name: [*values] for name, values in self.pictures.items()},
        }

    @classmethod
    def of_entry(cls, entry: Mapping[str, Any] | None) -> LearntNormals:
        """Return what :meth:`entry` gave; of nothing, one that knows nothing: older checkpoints have none."""
        if entry is None:
            return cls()
        pictures = {name: tuple(values) for name, values in entry["pictures"].items()}
        return cls(entry["origin"], tuple(entry["scores"]), pictures)


def distribution(numbers: Iterable[float]) -> tuple[float, ...]:
    """Return numbers in ascending order; of more than 1,000, as many of their quantiles.

    Example:
        >>> distribution([3, 1, 2])
        (1.0, 2.0, 3.0)
    """
    ordered = np.sort(np.fromiter(numbers, float))
    if len(ordered) > MOST:
        ordered = np.quantile(ordered, np.linspace(0, 1, MOST))
    return tuple(ordered.tolist())
