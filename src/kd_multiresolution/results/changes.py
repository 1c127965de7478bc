"""Whether two sets of images differ by more than chance, and by more than nothing.

Each test by itself has a known rate of false alarms. A difference that is real but small says nothing either: of a
thousand images any is real.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

TESTS = 5  # of a run: three of pictures, two of scores
LEVEL = 0.001 / TESTS  # of one test, so that chance alone makes a warning in one run of a thousand at most
FEWEST = 8  # images on either side
LEAST_DISTANCE = 0.5  # of the distributions, Kolmogorov and Smirnov's: from 0, the same, to 1, apart
LEAST_CHANGE = 0.1  # of the median of a statistic of pictures, as a fraction of it
LEAST_SHIFT = 0.25  # of the median score, as a fraction of its way to the threshold
LEAST_SHARE = 0.05  # of images more above the threshold


def picture_change(name: str, learnt: Sequence[float], found: Sequence[float]) -> str | None:
    """Return in words how a statistic of pictures has changed, ``None`` if it has not.

    Args:
        name: of the statistic.
        learnt: its values in training.
        found: its values now.

    Example:
        >>> bright, dark = [0.5 + i / 1000 for i in range(40)], [0.4 + i / 1000 for i in range(40)]
        >>> picture_change("brightness", bright, dark)
        'brightness 0.42, learnt 0.52 (-19 %)'
        >>> picture_change("brightness", bright, bright)
    """
    if not _differ(learnt, found):
        return None
    before, now = float(np.median(learnt)), float(np.median(found))
    change = (now - before) / max(abs(before), float(np.finfo(np.float32).tiny))
    if abs(change) < LEAST_CHANGE:
        return None
    return f"{name} {now:.3g}, learnt {before:.3g} ({100 * change:+.0f} %)"


def score_change(learnt: Sequence[float], found: Sequence[float], threshold: float) -> str | None:
    """Return in words how raw scores have changed, ``None`` if they have not.

    Args:
        learnt: of normal images.
        found: now.
        threshold: raw; NaN: none, and any real change is said.
    """
    if not _differ(learnt, found):
        return None
    before, now = float(np.median(learnt)), float(np.median(found))
    way = abs(threshold - before)
    if abs(now - before) < LEAST_SHIFT * way:  # never true of NaN
        return None
    of_the_way = "" if math.isnan(threshold) else f", threshold {threshold:.3g}"
    return f"median raw score {now:.3g}, of normal images {before:.3g}{of_the_way}"


def share_change(learnt: Sequence[float], found: Sequence[float], threshold: float) -> str | None:
    """Return in words if more images are above the threshold than among normal ones, by Fisher's exact test."""
    if math.isnan(threshold) or min(len(learnt), len(found)) < FEWEST:
        return None
    before, now = (sum(score > threshold for score in scores) for scores in (learnt, found))
    rise = now / len(found) - before / len(learnt)
    if rise < LEAST_SHARE:
        return None
    table = [[now, len(found) - now], [before, len(learnt) - before]]
    if stats.fisher_exact(table, alternative="greater").pvalue >= LEVEL:
        return None
    return f"{now} of {len(found)} above the threshold, of normal images {before} of {len(learnt)}"


def _differ(learnt: Sequence[float], found: Sequence[float]) -> bool:
    """Return whether Kolmogorov and Smirnov's test tells two sets of numbers apart, and clearly."""
    if min(len(learnt), len(found)) < FEWEST:
        return False
    outcome = stats.ks_2samp(learnt, found)
    return bool(outcome.pvalue < LEVEL and outcome.statistic >= LEAST_DISTANCE)
