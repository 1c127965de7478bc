"""The images of a test or a prediction: what was said of each, and small pictures of it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np
from sklearn.metrics import roc_auc_score, roc_curve

from kd_multiresolution.results.judged import JudgedImage, JudgedRun
from kd_multiresolution.results.marks import Marked, outline
from kd_multiresolution.results.tiles import OTHERS, Tile, fit, pictured, side_for

ROUNDING = 1e-3  # of scores in half precision, as a share of their range


@dataclass(frozen=True)
class ScoredImage:
    """An image, and what was said of it.

    Attributes:
        path: its file, or its name in a data set in memory; empty if there is neither.
        name: as much of it as tells the images of the run apart.
        raw: the score that the model gave.
        score: the one that the post-processor made of it.
        label: whether the post-processor called it defective; ``None`` if it said nothing.
        truth: whether it is; ``None`` if that is not known.
        percentile: share of held-out normal images whose score is at most this one's, in percent; ``None`` if unknown.
        marked: what was marked in it; ``None`` if nothing says.
    """

    path: str
    name: str
    raw: float
    score: float
    label: bool | None = None
    truth: bool | None = None
    percentile: float | None = None
    marked: Marked | None = None


@dataclass
class ScoredImages:
    """The images of a test or a prediction, in the order in which they came.

    Attributes:
        room: characters of the page for all that it has of them; 0 if there is no page.
        expected: how many images there will be; ``None`` if nobody knows.
        images: what was said of them.
        tiles: what the page shows of them; empty if there is no page.
    """

    room: int = 0
    expected: int | None = None
    images: list[ScoredImage] = field(default_factory=list)
    tiles: list[Tile] = field(default_factory=list)
    _side: float = 0.0  # of the largest pictures, in pixels
    _length: int = 0  # of all tiles
    _words: int = 0  # characters of the page about all images, beside the tiles

    def __post_init__(self) -> None:
        self._side = side_for(self.expected, self.room)

    def add(self, image: JudgedImage, raw: float, run: JudgedRun, percentile: float | None = None) -> None:
        """Add an image; where there is a page, with pictures.

        Args:
            image: which one.
            raw: the score that the model gave.
            run: what all images have in common.
            percentile: of held-out normal images.
        """
        frame = run.view.frame(image.image, image.path)
        scores = image.anomaly_map
        marks = None if scores is None else run.maps.marked(scores, image.predicted_mask)
        self.images.append(
            ScoredImage(
                path=image.path, name=image.name or f"image {len(self.images) + 1}", raw=raw, score=image.score,
                label=image.label, truth=image.truth, percentile=percentile,
                marked=None if marks is None else Marked.of(marks, frame),
            )
        )  # fmt: skip
        if self.room:
            # Twice the size of what the model saw shows all that it could see.
            side = max(1, round(min(self._side, 2 * max(image.image.shape[-2:]))))
            tile = pictured(frame.picture((side, side)), None if scores is None else run.maps.colours(scores))
            tile = replace(
                tile,
                mask=None if image.true_mask is None else outline(image.true_mask),
                outline=None if marks is None else outline(marks),
                own_range=scores is not None and run.maps.has_own_range(scores),
            )
            self._take([tile], self.images[-1:])

    def merge(self, other: ScoredImages) -> None:
        """Add another process's images, without those that Lightning repeats so that each process has as many."""
        known = {image.path for image in self.images if image.path}
        new = [number for number, image in enumerate(other.images) if image.path not in known]
        images = [other.images[number] for number in new]
        self.images += images
        if self.room:
            self._take([other.tiles[number] for number in new], images)

    def _take(self, tiles: list[Tile], images: list[ScoredImage]) -> None:
        self._words += sum(OTHERS + len(image.path) + len(image.name) for image in images)
        room = max(0, self.room - self._words)
        self.tiles += tiles
        self._length += sum(tile.length for tile in tiles)
        if self._length <= room:
            return
        # Pictures of good images with low scores are missed least.
        order = sorted(range(len(self.tiles)), key=lambda i: (self.images[i].truth is not True, -self.images[i].raw))
        fitted = fit([self.tiles[number] for number in order], room)
        for number, tile in zip(order, fitted, strict=True):
            self.tiles[number] = tile
        self._side = max(math.sqrt(tile.width * tile.height) for tile in fitted)
        self._length = sum(tile.length for tile in self.tiles)


def told_apart_at(images: Iterable[ScoredImage], threshold: float | None) -> bool:
    """Return whether the labels are those of this threshold of raw scores, but for rounding."""
    labelled = [(image.raw, image.label) for image in images if image.label is not None]
    if threshold is None or not labelled:
        return False
    raws = [raw for raw, _ in labelled]
    slack = ROUNDING * max(abs(threshold), max(raws) - min(raws))
    return all(raw > threshold - slack if label else raw <= threshold + slack for raw, label in labelled)


def roc(images: Iterable[ScoredImage]) -> tuple[list[tuple[float, float]], float] | None:
    """Return the points of the ROC curve (share of false alarms, share of defective images found) and the area below.

    Returns:
        ``None`` unless there are good and defective images.
    """
    known = [(image.truth, image.raw) for image in images if image.truth is not None]
    truths, raws = (np.array(values) for values in zip(*known, strict=True)) if known else (np.array([]),) * 2
    if len({*truths.tolist()}) < 2:
        return None
    false_alarms, found, _ = roc_curve(truths, raws)
    return [*zip(false_alarms.tolist(), found.tolist(), strict=True)], float(roc_auc_score(truths, raws))
