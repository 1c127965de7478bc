"""``scores.csv``: what was said of each image of a test or a prediction, one per line."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from kd_multiresolution.results.judged import Scale
from kd_multiresolution.results.scored import ScoredImage

COLUMNS = (
    "run", "path", "true_label", "raw_score", "normalised_score", "decision", "percentile_of_held_out_normals",
    "marked_area", "boxes", "frame",
)  # fmt: skip
KINDS = {None: "", False: "good", True: "defective"}


def write_scores(path: Path, images: Iterable[ScoredImage], scale: Scale, stage: str) -> None:
    """Write the table.

    Args:
        path: of the file.
        images: what was said of them.
        scale: of their scores.
        stage: ``test`` or ``predict``.

    Raises:
        OSError: if it cannot be written.
    """
    # A name of bytes that are no UTF-8 is written with backslashes.
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for image in images:
            marked = image.marked
            frame = "" if marked is None else f"{'file' if marked.of_file else 'model'} {marked.width}x{marked.height}"
            table.writerow(
                [
                    stage,
                    image.path or image.name,
                    KINDS[image.truth],
                    f"{image.raw:.9g}",
                    "" if scale.unit == "raw" else f"{image.score:.9g}",
                    KINDS[image.label],
                    "" if image.percentile is None else f"{image.percentile:.4g}",
                    "" if marked is None else marked.area,
                    "" if marked is None else "; ".join(" ".join(map(str, box)) for box in marked.boxes),
                    frame,
                ]
            )


def stage_of(path: Path) -> str | None:
    """Return which run wrote a table, ``test`` or ``predict``; ``None`` if it is not there, or none of ours."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return next(csv.DictReader(file), {}).get(COLUMNS[0])
    except (OSError, UnicodeDecodeError, csv.Error):
        return None
