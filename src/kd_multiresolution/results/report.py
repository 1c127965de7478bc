"""Writes the page about each test run, and says where it is."""

from __future__ import annotations

import logging
import re
import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from anomalib.data import ImageBatch
from lightning.pytorch import Callback, LightningModule, Trainer

from kd_multiresolution.results.judged import JudgedRun
from kd_multiresolution.results.page import draw_page
from kd_multiresolution.results.scored import ScoredImages

logger = logging.getLogger(__name__)

REPORT_FILE = "report.png"


class Report(Callback):
    """Writes one page about every test run, ``report.png``, into the run's folder.

    A histogram of the scores of normal and defective images, with the threshold that the labels were given by, the ROC
    curve where the test set has both kinds, and image, true mask and heat map of the most anomalous images and of those
    nearest to the threshold. How many were called defective is counted from the labels. Heat maps lie on what the
    post-processor marked, and on the whole image where it marks nothing. Without a fitted threshold nothing is nearest
    to it.
    """

    def __init__(self) -> None:
        self.run = JudgedRun()
        self.images = ScoredImages()
        self.page: Path | None = None

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier run, and see what decides in this one."""
        self.run = JudgedRun.of(trainer, pl_module)
        self.images = ScoredImages(self.run.scores.threshold)
        self.page = None

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: ImageBatch, *args: Any, **kwargs: Any
    ) -> None:
        """Take in the scores of a batch."""
        del trainer, pl_module, outputs, args, kwargs
        self.images.add(batch, self.run)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the page; of several processes the first one does.

        Lightning gives each process equally many images, and repeats one for that; it is then counted twice, as in the
        metrics.
        """
        del pl_module
        images = self.images
        if trainer.world_size > 1:
            parts: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, images)
            images = ScoredImages(images.threshold)
            for part in parts:
                images.merge(part)
        self.images = ScoredImages()
        if trainer.is_global_zero and images.scores:
            folder = Path(trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            self.page = folder / REPORT_FILE
            draw_page(images, self.run).savefig(self.page)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Say where the page and the pictures are, if they stay there."""
        folder = Path(trainer.default_root_dir)
        if not trainer.is_global_zero or stage not in {"test", "predict"} or _vanishes(folder):
            return
        if self.page is not None and stage == "test":
            logger.info("Report: %s", self.page)
        model = cast("Any", pl_module)
        pictures = Path(getattr(model.visualizer, "output_dir", None) or folder / "images")
        if model.visualizer is not None and pictures.is_dir():
            logger.info("Heat maps: %s (source: %s)", pictures, model.model.source)


def _vanishes(folder: Path) -> bool:
    """Return whether a folder is below a temporary one of Python's, in which ``anomalib benchmark`` runs its tests."""
    place, folder = Path(tempfile.gettempdir()).resolve(), folder.resolve()
    name = folder.relative_to(place).parts[0] if place in folder.parents else ""
    return re.fullmatch(f"{tempfile.gettempprefix()}[a-z0-9_]{{8}}", name) is not None
