"""The page about a test or a prediction: one file that needs no network, and shows what each threshold would cost."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from string import Template
from typing import Any, Literal

from kd_multiresolution.results.decision import Decision
from kd_multiresolution.results.judged import JudgedRun
from kd_multiresolution.results.scored import ScoredImage, ScoredImages, roc, told_apart_at
from kd_multiresolution.results.tiles import SMALLEST, Tile

ROOM = 14_000_000  # characters for its images, of 15 MB for the page
SCRIPTS = ("scores", "histogram", "roc", "threshold", "tiles", "large", "start")  # in this order
BOXES = 5  # of an image; scores.csv has more of them


@dataclass(frozen=True)
class Setting:
    """A line that sets a threshold.

    Attributes:
        where: what it is, such as "Python".
        line: what to type, with ``{threshold}`` for the raw score, ``{sensitivity}`` for the one of the post-processor
            whose threshold that is, ``{false_alarms}`` for how many good images lie above it.
    """

    where: str
    line: str


@dataclass(frozen=True)
class Heading:
    """What the page is about.

    Attributes:
        stage: ``test`` or ``predict``.
        model: its name.
        about: further lines, such as the checkpoint and the time.
        settings: lines that set a threshold.
        normals: the good images that percentiles are told from, in words; empty if there are none.
    """

    stage: Literal["test", "predict"]
    model: str
    about: Sequence[str] = ()
    settings: Sequence[Setting] = ()
    normals: str = ""

    @property
    def title(self) -> str:
        """The title of the page."""
        return f"{'Test' if self.stage == 'test' else 'Prediction'} with {self.model}"


def render_page(images: ScoredImages, run: JudgedRun, decision: Decision, heading: Heading) -> str:
    """Return the page, HTML with all that it needs.

    Args:
        images: at least one.
        run: what they have in common.
        decision: how they were told apart.
        heading: what the page is about.
    """
    parts = files(__package__) / "page_files"
    data = {
        "axis": {"middle": decision.middle, "span": decision.span} if decision.span > 0 else None,
        "threshold": None if decision.threshold is None else _digits(decision.threshold),
        "normalised": run.scores.unit != "raw",
        "normals": heading.normals,
        "settings": [{"where": setting.where, "line": setting.line} for setting in heading.settings],
        "roc": _curve(images.images),
        "images": [_entry(image, tile) for image, tile in zip(images.images, images.tiles, strict=True)],
    }
    template = Template((parts / "report.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(heading.title),
        about="".join(f"<li>{escape(line)}</li>" for line in heading.about),
        notes="".join(f"<li>{escape(note)}</li>" for note in _notes(images, run, decision)),
        style=(parts / "report.css").read_text(encoding="utf-8"),
        script="\n".join((parts / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS),
        # What a file is called must not end the element.
        data=json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
    )


def _entry(image: ScoredImage, tile: Tile) -> dict[str, Any]:
    marked = image.marked
    return {
        "name": image.name,
        "path": image.path,
        "truth": image.truth,
        "raw": _digits(image.raw),
        "score": round(image.score, 4),
        "label": image.label,
        "percentile": None if image.percentile is None else round(image.percentile, 1),
        "marked": marked
        and {
            "area": marked.area,
            "regions": marked.regions,
            "boxes": marked.boxes[:BOXES],
            "frame": f"{marked.width} x {marked.height} pixels of {'the file' if marked.of_file else 'what it saw'}",
        },
        "width": tile.width,
        "height": tile.height,
        "picture": b64encode(tile.picture).decode(),
        "heat": b64encode(tile.heat).decode(),
        "mask": tile.mask,
        "outline": tile.outline,
    }


def _curve(images: Sequence[ScoredImage]) -> dict[str, Any] | None:
    if (found := roc(images)) is None:
        return None
    points, area = found
    return {"points": [(round(x, 5), round(y, 5)) for x, y in points], "area": round(area, 4)}


def _notes(images: ScoredImages, run: JudgedRun, decision: Decision) -> list[str]:
    """Say what is to be known of the figures and pictures."""
    notes = []
    truths = {image.truth for image in images.images}
    if decision.origin:
        optimistic = " Figures at this threshold are optimistic." if decision.optimistic else ""
        notes.append(f"{decision.origin}.{optimistic}")
    if decision.threshold is None:
        notes.append("No threshold is known. The line begins where no good image, or none at all, lies above it.")
    elif not told_apart_at(images.images, decision.threshold):
        notes.append("The images were not labelled by this threshold: a post-processor of another kind has decided.")
    if run.scores.fitted is not None:
        fitted, used = run.scores.fitted, run.scores.threshold
        notes.append(f"The threshold that was fitted is {fitted:.4g}; labels were given by {used:.4g}.")
    if truths == {None}:
        notes.append("Nobody says which images are good: there are no false alarms and misses to count.")
    elif True not in truths:
        notes.append("There are no defective images among them: misses cannot be counted, and there is no ROC curve.")
    elif False not in truths:
        notes.append("There are no good images among them: false alarms cannot be counted, and there is no ROC curve.")
    if any(tile.own_range for tile in images.tiles):
        notes.append("Heat maps are raw: each has colours of its own range, and cannot be compared with another.")
    if all(tile.outline is None for tile in images.tiles):
        notes.append("No pixels were marked as defective: no threshold of pixels is known, or there are no maps.")
    return [*notes, *_sizes(images.tiles)]


def _sizes(tiles: Sequence[Tile]) -> list[str]:
    shown = [tile for tile in tiles if tile.picture]
    left_out = len(tiles) - len(shown)
    notes = []
    if shown:
        width, height = max((tile.width, tile.height) for tile in shown)
        notes.append(f"Pictures are small, up to {width} x {height} pixels here, so that the page stays below 15 MB.")
    if left_out:
        notes.append(
            f"{left_out} images have no picture, for want of room at {SMALLEST} pixels each: those not known to be "
            "defective that have the lowest scores."
        )
    return notes


def _digits(score: float) -> float:
    """Return a score with the digits that tell it from others of its precision."""
    return float(f"{score:.9g}")
