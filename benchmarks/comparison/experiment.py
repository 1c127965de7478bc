"""One trial: fit, test, and what they cost, in a process of its own."""

from __future__ import annotations

import logging
import resource
import time
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from anomalib.callbacks import ModelCheckpoint
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from anomalib.models.components import AnomalibModule
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from comparison.candidates import CANDIDATES
from comparison.trial import Trial
from kd_multiresolution import EvaluationAfterConvergence
from kd_multiresolution.raw_metrics import Predictions, raw_metrics
from reproduction.experiment import environment

MIB = 2**20


class TestPass(Callback):
    """Keeps raw predictions and the seconds of a test."""

    def __init__(self) -> None:
        self.parts: list[Predictions] = []
        self.seconds = 0.0
        self.start = 0.0

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        del trainer, pl_module
        self.start = time.perf_counter()

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Keep scores, labels, maps and masks."""
        del trainer, pl_module, batch, batch_idx, args
        scores, maps = outputs.pred_score.cpu().flatten(), outputs.anomaly_map.cpu().flatten(0, -3)[:, None]
        masks = cast("Tensor", outputs.gt_mask).as_subclass(Tensor).cpu().bool()
        self.parts.append(Predictions(scores, outputs.gt_label.cpu().int(), maps, masks))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        del trainer, pl_module
        self.seconds = time.perf_counter() - self.start

    def metrics(self) -> dict[str, float]:
        """Return the metrics of all images."""
        fields = {n: torch.cat([getattr(p, n) for p in self.parts]) for n in ("scores", "labels", "maps", "masks")}
        return raw_metrics(Predictions(**fields))


class TrainingCurve(Callback):
    """Tests the model every so many epochs, while the clock of the training stands still.

    Args:
        interval: epochs.
    """

    def __init__(self, interval: int) -> None:
        self.evaluation = EvaluationAfterConvergence()
        self.interval = interval
        self.paused = 0.0
        self.start = time.perf_counter()
        self.points: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Test, and note after how many seconds of training."""
        epochs = trainer.current_epoch + 1
        if epochs % self.interval:
            return
        began = time.perf_counter()
        metrics = self.evaluation.evaluate(trainer, cast("AnomalibModule", pl_module))
        self.points.append({"epochs": epochs, "seconds": began - self.start - self.paused, **metrics})
        self.paused += time.perf_counter() - began


def data_of(trial: Trial, root: Path) -> MVTecAD:
    """Return the trial's images, set up; where they are limited, all models get the same ones."""
    # Where a model validates, not on test images, which is MVTecAD's default.
    validation: dict[str, Any] = {"val_split_mode": "from_train", "val_split_ratio": 0.125}
    data = MVTecAD(
        root,
        trial.category,
        train_batch_size=trial.batch_size,
        eval_batch_size=8,
        num_workers=0,
        **(validation if CANDIDATES[trial.model].validates else {}),
    )
    data.prepare_data()
    data.setup(TrainerFn.FITTING)  # as the trainer calls it; the trainer's own call then leaves the data as they are
    if trial.train_limit is not None:
        order = torch.randperm(len(data.train_data), generator=torch.Generator().manual_seed(trial.seed))
        data.train_data = data.train_data.subsample(sorted(order[: trial.train_limit].tolist()), inplace=False)
    return data


def run(trial: Trial, root: Path, checkpoint: Path) -> dict[str, Any]:
    """Fit, test, write a checkpoint, and return settings, environment, metrics and costs as plain data.

    Args:
        trial: what is trained.
        root: folder of MVTec AD.
        checkpoint: the file to write.
    """
    warnings.filterwarnings("ignore", module=r"lightning\.")
    for name in ("lightning.pytorch", "lightning_fabric", "anomalib"):
        logging.getLogger(name).setLevel(logging.WARNING)
    torch.set_num_threads(trial.threads)
    seed_everything(trial.seed, verbose=False)
    candidate = CANDIDATES[trial.model]
    model = candidate.build(trial)
    data = data_of(trial, root)
    # A model of one epoch fits its statistics after it: before that there is nothing to test.
    curve = None if trial.curve is None or candidate.epochs == 1 else TrainingCurve(trial.curve)
    test = TestPass()
    length = {} if trial.epochs is None else {"max_epochs": trial.epochs}
    with TemporaryDirectory() as folder:
        engine = Engine(
            default_root_dir=folder,
            # No checkpoint after every epoch, and no validation but EfficientAD's, which scales its maps by it.
            callbacks=[test, ModelCheckpoint(save_top_k=0), *([curve] if curve else [])],
            limit_val_batches=1.0 if candidate.validates else 0,
            check_val_every_n_epoch=trial.epochs if candidate.validates else 1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **length,
        )
        began = time.perf_counter()
        engine.fit(model, datamodule=data)
        fit_seconds = time.perf_counter() - began - (curve.paused if curve else 0)
        epochs = engine.trainer.current_epoch
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        engine.trainer.save_checkpoint(checkpoint)
        engine.test(model, datamodule=data, verbose=False)
    # Before the metrics, which have nothing to do with the model.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    metrics = test.metrics()
    points = curve.points if curve else []
    if curve and (not points or points[-1]["epochs"] < epochs):  # the training need not end with an interval
        points = [*points, {"epochs": epochs, "seconds": fit_seconds, **metrics}]
    return {
        "trial": trial.as_json(),
        "environment": environment(),
        "images": {"train": len(data.train_data), "test": len(data.test_data)},
        "epochs": epochs,
        "fit_seconds": fit_seconds,
        "test_seconds": test.seconds,
        "peak_mib": peak / MIB,
        "device_mib": torch.cuda.max_memory_allocated() / MIB if torch.cuda.is_available() else None,
        "checkpoint_mib": checkpoint.stat().st_size / MIB,
        "metrics": metrics,
        "curve": points,
    }
