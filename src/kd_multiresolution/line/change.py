"""What setting a threshold again has changed, in numbers and in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

NAMES = {"image": "images", "pixel": "pixels"}


@dataclass(frozen=True)
class Decisions:
    """What a post-processor makes of the given images.

    Attributes:
        thresholds: raw ones by kind, ``image`` and, where maps were looked at, ``pixel``; NaN where none is known.
        alarms: how many good images are called defective.
        misses: how many defective ones are called good.
        marked: how many good images have a marked pixel; ``None`` without maps or images.
    """

    thresholds: Mapping[str, float]
    alarms: int
    misses: int
    marked: int | None


@dataclass(frozen=True)
class ThresholdChange:
    """What setting a threshold again has changed; as a string, in words.

    Attributes:
        before: decisions of the checkpoint that was read.
        after: those of the one that was written.
        good: number of good images.
        defective: number of defective ones.
        expected: rate of false alarms to be expected of one more good image, at most; ``None`` unless a rate or a
            number was asked for.
        bound: what the rate is below with 95 % confidence; ``None`` likewise.
        cost: mean cost of an image before and after, if costs were given.
        scale: where 0.5 on the old scale of normalised scores lies on the new one; ``None`` if one has none.
        notes: what else is other than it was.
        checkpoint: the new file.
    """

    before: Decisions
    after: Decisions
    good: int
    defective: int
    expected: float | None
    bound: float | None
    cost: tuple[float, float] | None
    scale: float | None
    notes: tuple[str, ...]
    checkpoint: Path

    def __str__(self) -> str:
        """Return it in words."""
        before, after = self.before, self.after
        lines = [
            f"Threshold of {NAMES[kind]}: {_number(before.thresholds[kind])} before, {_number(number)} now (raw)."
            for kind, number in after.thresholds.items()
        ]
        if self.scale is not None:
            lines.append(f"A normalised score of 0.5 before is {self.scale:.3f} now; 0.5 is the new threshold.")
        if self.good:
            lines.append(
                f"Of {self.good} good images {before.alarms} were called defective before, {after.alarms} are now."
            )
        if after.marked is not None:
            lines.append(f"Of these {before.marked} had a marked pixel before, {after.marked} have one now.")
        if self.defective:
            lines.append(
                f"Of {self.defective} defective images {before.misses} were called good before, {after.misses} are now."
            )
        if self.expected is not None:
            lines.append(
                f"One more good image of this kind is called defective in at most {100 * self.expected:.3g} % of the "
                f"cases; the rate is below {100 * cast('float', self.bound):.3g} % with 95 % confidence."
            )
        if self.cost is not None:
            lines.append(f"An image costs {self.cost[0]:.4g} on average before, {self.cost[1]:.4g} now.")
        return "\n".join([*lines, *self.notes, f"Written: {self.checkpoint}"])


def _number(value: float) -> str:
    return "none" if value != value else f"{value:.6g}"
