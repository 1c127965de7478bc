"""The scores of a test run, what was made of them, and the images that are looked at first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from anomalib.data import ImageBatch
from torch import Tensor

from kd_multiresolution.results.judged import JudgedImage, JudgedRun

PICTURES = 6  # of either kind
ROUNDING = 1e-3  # of scores in half precision


@dataclass
class ScoredImages:
    """What the page shows of a test run.

    Attributes:
        threshold: the score from which the nearest are told; ``None`` if there is none.
        scores: of all images, (N,).
        truths: whether they are defective, (N,).
        labels: whether they were called defective, (N,); empty if nothing was said.
        most_anomalous: the images with the highest scores, the highest first.
        nearest: those nearest to the threshold, the nearest first; twice as many, since the others may be among them.
    """

    threshold: float | None = None
    scores: list[float] = field(default_factory=list)
    truths: list[bool] = field(default_factory=list)
    labels: list[bool] = field(default_factory=list)
    most_anomalous: list[JudgedImage] = field(default_factory=list)
    nearest: list[JudgedImage] = field(default_factory=list)

    def add(self, batch: ImageBatch, run: JudgedRun) -> None:
        """Add the predictions of a batch, and keep those of its pictures that may come onto the page.

        Images of which nobody says whether they are defective are left out.
        """
        if batch.gt_label is None:
            return
        scores = cast("Tensor", batch.pred_score).detach().float().flatten().tolist()
        truths = cast("Tensor", batch.gt_label).bool().flatten().tolist()
        given = batch.pred_label if run.scores.decides else None
        labels = [] if given is None else given.bool().flatten().tolist()
        highest = _first(range(len(scores)), PICTURES, lambda i: -scores[i])
        nearest = _first(range(len(scores)), 2 * PICTURES, lambda i: self._distance(scores[i]))
        images = {i: run.image(batch, i) for i in {*highest, *nearest}}
        self.merge(
            ScoredImages(None, scores, truths, labels, [images[i] for i in highest], [images[i] for i in nearest])
        )

    def merge(self, other: ScoredImages) -> None:
        """Add other predictions, such as another process's."""
        self.scores += other.scores
        self.truths += other.truths
        self.labels += other.labels
        highest = _single(self.most_anomalous + other.most_anomalous)
        nearest = _single(self.nearest + other.nearest)
        self.most_anomalous = _first(highest, PICTURES, lambda image: -image.score)
        self.nearest = _first(nearest, 2 * PICTURES, lambda image: self._distance(image.score))

    @property
    def line(self) -> float | None:
        """The threshold, if it is what the labels were given by."""
        if self.threshold is None or not self.labels:
            return None
        slack = ROUNDING * max(1.0, abs(self.threshold))
        labelled = zip(self.scores, self.labels, strict=True)
        fits = all(
            (score > self.threshold - slack) if label else (score <= self.threshold + slack)
            for score, label in labelled
        )
        return self.threshold if fits else None

    @property
    def borderline(self) -> list[JudgedImage]:
        """The images nearest to the threshold, without the most anomalous ones, the nearest first."""
        if self.line is None:
            return []
        shown = {_key(image) for image in self.most_anomalous}
        return [image for image in self.nearest if _key(image) not in shown][:PICTURES]

    def _distance(self, score: float) -> float:
        return abs(score - (self.threshold or 0.0))


def _first(values: Iterable[Any], count: int, key: Callable[[Any], float]) -> list[Any]:
    return sorted(values, key=key)[:count]


def _key(image: JudgedImage) -> Any:
    return image.path or id(image)


def _single(images: Sequence[JudgedImage]) -> list[JudgedImage]:
    """Return images without those that Lightning repeats, so that each process has as many."""
    return [*{_key(image): image for image in images}.values()]
