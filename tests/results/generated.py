"""Images as a test or a prediction leaves them, and the page about them."""

from __future__ import annotations

import json
import re
from typing import Any

import torch
from anomalib.data import ImageBatch

from kd_multiresolution.results.decision import Decision
from kd_multiresolution.results.judged import JudgedRun, Scale
from kd_multiresolution.results.page import ROOM, Heading, Setting, render_page
from kd_multiresolution.results.scored import ScoredImages

SIZE = 32
RUN = JudgedRun(scores=Scale("normalised", 0.5), maps=Scale("normalised", 0.5))
RAW = JudgedRun(scores=Scale("raw"), maps=Scale("raw"))
LINE = Setting("Line", "raw {threshold}, sensitivity {sensitivity}, alarms {false_alarms}")
HEADING = Heading("test", "KdMultiresolution", ["2026-01-01 12:00"], [LINE], "validation")


def batch(scores: list[float], truths: list[int] | None, names: list[str] | None = None, **fields: Any) -> ImageBatch:
    """Return images of noise with scores whose threshold is 0.5; the left upper quarter of each is marked."""
    maps = torch.rand(len(scores), 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    marks = torch.zeros(len(scores), SIZE, SIZE).bool()
    marks[:, : SIZE // 2, : SIZE // 2] = True
    return ImageBatch(**{
        "image": maps.expand(-1, 3, -1, -1), "gt_label": None if truths is None else torch.tensor(truths).bool(),
        "pred_score": torch.tensor(scores), "pred_label": torch.tensor(scores) > 0.5, "anomaly_map": maps,
        "pred_mask": marks, "image_path": names or [f"memory/{score}" for score in scores],
        **fields,
    })  # fmt: skip


def scored(run: JudgedRun, *batches: ImageBatch, room: int = ROOM, expected: int | None = None) -> ScoredImages:
    """Return them, with raw scores ten times the given ones."""
    images = ScoredImages(room, expected)
    for part in batches:
        for index, score in enumerate(part.pred_score.tolist()):
            images.add(run.image(part, index), 10 * score, run)
    return images


MIXED = (batch([0.1, 0.52, 0.2], [0, 0, 0]), batch([0.9, 0.4, 0.7, 0.6, 0.8], [1, 1, 1, 1, 1]))


def page(images: ScoredImages, run: JudgedRun = RUN, decision: Decision | None = None) -> str:
    return render_page(images, run, decision or Decision(5.0, 5.0, 10.0), HEADING)


def data_of(html: str) -> dict[str, Any]:
    """Return what a page knows of its images."""
    [found] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    return json.loads(found)


def notes_of(html: str) -> str:
    [found] = re.findall(r'<ul class="notes" id="notes">(.*?)</ul>', html, re.DOTALL)
    return found
