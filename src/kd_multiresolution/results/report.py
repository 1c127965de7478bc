"""Writes the table and the page about each test and prediction, and says where they are."""

from __future__ import annotations

import logging
import re
import shlex
import tempfile
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, cast

import torch
from anomalib.data import ImageBatch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from kd_multiresolution.plugin.module import PluginModule
from kd_multiresolution.results.decision import Decision
from kd_multiresolution.results.judged import JudgedRun
from kd_multiresolution.results.page import ROOM, Heading, Setting, render_page
from kd_multiresolution.results.scored import ScoredImages
from kd_multiresolution.results.scores_file import stage_of, write_scores
from kd_multiresolution.results.view import datasets

logger = logging.getLogger(__name__)

REPORT_FILE = "report.html"
SCORES_FILE = "scores.csv"

Stage = Literal["test", "predict"]


class RawScores(Callback):
    """Keeps the scores that the model gave for a batch; to stand before the post-processor, which changes them."""

    def __init__(self) -> None:
        self.scores: list[float] = []

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: ImageBatch, *args: Any, **kwargs: Any
    ) -> None:
        """Keep them."""
        del trainer, pl_module, outputs, args, kwargs
        self.scores = cast("Tensor", batch.pred_score).detach().float().flatten().tolist()

    def on_predict_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Do as :meth:`on_test_batch_end`."""
        self.on_test_batch_end(*args, **kwargs)


class Report(Callback):
    """Writes ``scores.csv`` and ``report.html`` about every test and prediction into the run's folder.

    The table has a line for each image, the page its picture, true mask, heat map and the outline of what was marked,
    beside the distribution of scores with a threshold to be moved. A prediction never overwrites what a test has
    written, nor the other way round: the later one goes into a folder ``test`` or ``predict`` then.

    Args:
        pages: write the page as well as the table.
    """

    def __init__(self, *, pages: bool = True) -> None:
        self.pages = pages
        self.raw_scores = RawScores()
        self.run = JudgedRun()
        self.decision = Decision()
        self.images = ScoredImages()
        self.written: list[Path] = []

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier run, and see what decides in this one."""
        self.run = JudgedRun.of(trainer, pl_module)
        self.decision = Decision.of(trainer, pl_module)
        self.images = ScoredImages(ROOM if self.pages else 0, _count(trainer))
        self.written = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do as :meth:`on_test_start`."""
        self.on_test_start(trainer, pl_module)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: ImageBatch, *args: Any, **kwargs: Any
    ) -> None:
        """Take in what was said of a batch."""
        del trainer, outputs, args, kwargs
        learnt = getattr(pl_module, "learnt", None)  # what a checkpoint knows of good images
        for index, raw in enumerate(self.raw_scores.scores):
            percentile = None if learnt is None else learnt.percentile(raw)
            self.images.add(self.run.image(batch, index), raw, self.run, percentile)

    def on_predict_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Do as :meth:`on_test_batch_end`."""
        self.on_test_batch_end(*args, **kwargs)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the table and the page; of several processes the first one does."""
        self._write(trainer, pl_module, "test")

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do as :meth:`on_test_end`."""
        self._write(trainer, pl_module, "predict")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Say where they and the pictures are, if they stay there."""
        folder = Path(trainer.default_root_dir)
        if not trainer.is_global_zero or stage not in {"test", "predict"} or _vanishes(folder):
            return
        for path in self.written:
            logger.info("%s: %s", "Report" if path.name == REPORT_FILE else "Scores", path)
        self.written = []
        model = cast("Any", pl_module)
        pictures = Path(getattr(model.visualizer, "output_dir", None) or folder / "images")
        if model.visualizer is not None and pictures.is_dir():
            logger.info("Heat maps: %s (source: %s)", pictures, model.model.source)

    def _write(self, trainer: Trainer, pl_module: LightningModule, stage: Stage) -> None:
        images = self.images
        if trainer.world_size > 1:
            parts: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, images)
            images = ScoredImages(images.room, images.expected)
            for part in parts:
                images.merge(part)
        self.images = ScoredImages()
        if not trainer.is_global_zero or not images.images:
            return
        folder = _folder(Path(trainer.default_root_dir), stage)
        scale = self.run.scores
        self._put(folder / SCORES_FILE, lambda path: write_scores(path, images.images, scale, stage))
        if self.pages:
            self._put(folder / REPORT_FILE, lambda path: self._write_page(path, images, trainer, pl_module, stage))

    def _write_page(
        self, path: Path, images: ScoredImages, trainer: Trainer, pl_module: LightningModule, stage: Stage
    ) -> None:
        has_good = any(image.truth is False for image in images.images)
        heading = _heading(trainer, pl_module, stage, self.decision, has_good=has_good)
        path.write_text(render_page(images, self.run, self.decision, heading), encoding="utf-8")

    def _put(self, path: Path, write: Callable[[Path], Any]) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path)
        except Exception as error:  # a table that a spreadsheet has open, or a page of ours, must not cost the figures
            logger.error("%s could not be written (%s).", path, error, exc_info=not isinstance(error, OSError))
        else:
            self.written.append(path)


def _heading(
    trainer: Trainer,
    pl_module: LightningModule,
    stage: Stage,
    decision: Decision,
    *,
    has_good: bool,
) -> Heading:
    name = getattr(pl_module, "name", type(pl_module).__name__)
    about = [datetime.now().astimezone().strftime("%Y-%m-%d %H:%M")]
    checkpoint = "model.ckpt"
    if path := trainer.ckpt_path or getattr(pl_module, "checkpoint_file", ""):
        file = Path(path)
        checkpoint = str(file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file)
        about.append(f"Checkpoint {checkpoint}")
    settings = _settings(pl_module, checkpoint, decision, has_good=has_good)
    return Heading(stage, name, about, settings, getattr(getattr(pl_module, "learnt", None), "origin", ""))


def _settings(pl_module: LightningModule, checkpoint: str, decision: Decision, *, has_good: bool) -> list[Setting]:
    """Return lines that set a threshold; there are none where none can decide, or of another model."""
    model = cast("Any", pl_module)
    if not isinstance(pl_module, PluginModule) or not getattr(model.post_processor, "enable_thresholding", False):
        return []
    program = f"kd-multiresolution-threshold --checkpoint {shlex.quote(checkpoint)} --output new.ckpt"
    # With "=", for a raw score can be negative.
    settings = [Setting("A new checkpoint", f"{program} --threshold={{threshold}}")]
    if has_good:
        settings.append(Setting("From fresh good images", f"{program} --good FOLDER --false_alarms {{false_alarms}}"))
    if decision.threshold is not None and decision.span > 0:
        load = f"model = {model.name}.load_from_checkpoint({checkpoint!r})"
        settings.append(Setting("Python", f"{load}\nmodel.post_processor.image_sensitivity = {{sensitivity}}"))
    return settings


def _folder(folder: Path, stage: str) -> Path:
    """Return where a test or a prediction writes: beside what the other has written, never over it."""
    before = stage_of(folder / SCORES_FILE)
    return folder if before in {None, stage} else folder / stage


def _count(trainer: Trainer) -> int | None:
    """Return how many images a test or a prediction has, if its data sets say."""
    try:
        return sum(len(data) for data in datasets(trainer))
    except TypeError:  # one that is only gone through
        return None


def _vanishes(folder: Path) -> bool:
    """Return whether a folder is below a temporary one of Python's, in which ``anomalib benchmark`` runs its tests."""
    place, folder = Path(tempfile.gettempdir()).resolve(), folder.resolve()
    name = folder.relative_to(place).parts[0] if place in folder.parents else ""
    return re.fullmatch(f"{tempfile.gettempprefix()}[a-z0-9_]{{8}}", name) is not None
