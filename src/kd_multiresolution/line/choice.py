"""Where a threshold has to lie: for a number or a rate of false alarms, or for the costs of mistakes.

Nothing is assumed of how scores are distributed. An image is called defective if its score is above the threshold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt
from scipy import stats

Scores = npt.NDArray[np.float64]

CONFIDENCE = 0.95
MARGIN = 100  # a threshold above all scores keeps a hundredth of their upper half's width from the highest
HIGHEST_RATE = 0.5


@dataclass(frozen=True)
class Costs:
    """What mistakes cost, in any unit, and how often defective images will come.

    Attributes:
        miss: of a defective image that is called good.
        false_alarm: of a good image that is called defective.
        defect_share: fraction of defective images among those to come; ``None``: as among those that are given.
    """

    miss: float
    false_alarm: float
    defect_share: float | None = None

    def per_image(self, alarms: float, misses: float, good: int, defective: int) -> float:
        """Return the mean cost of an image.

        Args:
            alarms: how many of the good images are called defective.
            misses: how many of the defective ones are called good.
            good: number of good images.
            defective: number of defective ones.
        """
        share = defective / (good + defective) if self.defect_share is None else self.defect_share
        return self.false_alarm * (1 - share) * alarms / good + self.miss * share * misses / defective


def allowed_by_rate(rate: float, count: int) -> int:
    """Return how many of some good images may be above a threshold whose rate of false alarms is to be kept.

    One more image, as new to the model as these, is above the k-th highest of n scores with a probability of k / (n +
    1) at most, whatever their distribution.

    Args:
        rate: of false alarms, above 0 and below 0.5.
        count: number of good images.

    Raises:
        ValueError: if so few images cannot show such a rate.

    Example:
        >>> allowed_by_rate(0.01, 300)
        2
    """
    if not 0 < rate < HIGHEST_RATE:
        msg = f"false_alarm_rate={rate!r}: expected a fraction of good images, above 0 and below {HIGHEST_RATE}."
        raise ValueError(msg)
    exact = Fraction(str(rate))  # 0.07 of 100 is 7, and not a little less
    highest = math.floor(exact * (count + 1))
    if highest < 1:
        needed = math.ceil(1 / exact) - 1
        msg = (
            f"false_alarm_rate={rate:g}: {count} good images cannot show a rate below {1 / (count + 1):.2g}. Give "
            f"{needed} good images or more, or a rate of {math.ceil(1e4 / (count + 1)) / 1e4:g} or more."
        )
        raise ValueError(msg)
    return highest - 1


def expected_rate(allowed: int, count: int) -> tuple[float, float]:
    """Return how often one more good image is above, at most, and a bound of the rate itself with 95 % confidence.

    Args:
        allowed: how many of the good images the threshold was let to have above it.
        count: number of good images.
    """
    return (allowed + 1) / (count + 1), float(stats.beta.ppf(CONFIDENCE, allowed + 1, count - allowed))


def with_above(scores: Sequence[float] | Scores, allowed: int) -> float:
    """Return a threshold that so many scores exceed, or fewer where scores are equal, half-way to the next higher one.

    Above all of them it keeps a small distance, so that another machine's last digits change no decision.

    Example:
        >>> with_above([1, 2, 3, 5], 1)
        4.0
    """
    ordered = np.sort(np.asarray(scores, dtype=float))
    below = ordered[len(ordered) - 1 - allowed]
    higher = ordered[ordered > below]
    return float((below + higher[0]) / 2) if len(higher) else float(below) + _margin(ordered)


def cheapest(costs: Costs, good: Scores, defective: Scores) -> float:
    """Return the threshold at which mistakes on the given images cost least: of several, in the widest gap."""
    everything = np.concatenate([good, defective])
    margin = _margin(everything)
    values = np.unique(everything)
    edges = np.concatenate([[values[0] - 2 * margin], values, [values[-1] + 2 * margin]])
    candidates, widths = (edges[1:] + edges[:-1]) / 2, np.diff(edges)
    mistakes = [((good > threshold).sum(), (defective <= threshold).sum()) for threshold in candidates]
    paid = np.array([costs.per_image(*numbers, len(good), len(defective)) for numbers in mistakes])
    least = np.isclose(paid, paid.min(), rtol=1e-9, atol=0)
    return float(candidates[least][widths[least].argmax()])


def _margin(scores: Scores) -> float:
    highest = float(scores.max())
    return max((highest - float(np.median(scores))) / MARGIN, abs(highest) * 1e-3, float(np.finfo(np.float32).tiny))
