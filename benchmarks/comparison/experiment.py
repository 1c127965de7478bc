"""One trial: fit, test, and what they cost, in a process of its own."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from anomalib.callbacks import ModelCheckpoint
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from anomalib.models.components import AnomalibModule
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

from comparison.candidates import CANDIDATES
from comparison.trial import Trial
from kd_multiresolution import EvaluationAfterConvergence
from reporting import MIB, environment, now, peak_mib, quiet


class Measurement(Callback):
    """Raw metrics on the way, while the clock of the training stands still, and after the test.

    Args:
        interval: epochs from one measurement to the next; ``None``: the test alone.
    """

    def __init__(self, interval: int | None) -> None:
        self.evaluation = EvaluationAfterConvergence()
        self.interval = interval
        self.paused = 0.0
        self.start = self.test_start = now()
        self.points: list[dict[str, float]] = []
        self.test: dict[str, Any] = {}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate, and note after how many seconds of training."""
        epochs = trainer.current_epoch + 1
        if self.interval is None or epochs % self.interval:
            return
        began = now()
        metrics = self.evaluation.evaluate(trainer, cast("AnomalibModule", pl_module))
        self.points.append({"epochs": epochs, "seconds": began - self.start - self.paused, **metrics})
        self.paused += now() - began

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of the test."""
        del trainer, pl_module
        self.test_start = now()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what the test took, and what peak of memory there was, before the metrics need any."""
        self.test = {
            "test_seconds": now() - self.test_start,
            **peak_mib(),
            "metrics": self.evaluation.evaluate(trainer, cast("AnomalibModule", pl_module)),
        }


def data_of(trial: Trial, root: Path) -> MVTecAD:
    """Return the trial's images, set up; where they are limited, all models get the same ones."""
    # Where a model validates, not on test images, which is MVTecAD's default.
    validation: dict[str, Any] = {"val_split_mode": "from_train", "val_split_ratio": 0.125}
    data = MVTecAD(
        root, trial.category, train_batch_size=trial.batch_size, eval_batch_size=8, num_workers=0,
        **(validation if CANDIDATES[trial.model].validates else {}),
    )  # fmt: skip
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
    quiet()
    torch.set_num_threads(trial.threads)
    seed_everything(trial.seed, verbose=False)
    candidate = CANDIDATES[trial.model]
    model = candidate.build(trial)
    data = data_of(trial, root)
    # A model of one epoch fits its statistics after it: before that there is nothing to test.
    measurement = Measurement(None if candidate.epochs == 1 else trial.curve)
    length: dict[str, Any] = {} if trial.epochs is None else {"max_epochs": trial.epochs}
    with TemporaryDirectory() as folder:
        engine = Engine(
            default_root_dir=folder,
            # No checkpoint after every epoch, and no validation but EfficientAD's, which scales its maps by it.
            callbacks=[measurement, ModelCheckpoint(save_top_k=0)],
            limit_val_batches=1.0 if candidate.validates else 0,
            check_val_every_n_epoch=trial.epochs if candidate.validates else 1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **length,
        )
        began = now()
        engine.fit(model, datamodule=data)
        fit_seconds = now() - began - measurement.paused
        epochs = engine.trainer.current_epoch
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        engine.trainer.save_checkpoint(checkpoint)
        engine.test(model, datamodule=data, verbose=False)
    points = measurement.points
    if measurement.interval and (not points or points[-1]["epochs"] < epochs):  # it need not end with an interval
        points = [*points, {"epochs": epochs, "seconds": fit_seconds, **measurement.test["metrics"]}]
    return {
        "trial": trial.as_json(),
        "environment": environment(),
        "images": {"train": len(data.train_data), "test": len(data.test_data)},
        "epochs": epochs,
        "fit_seconds": fit_seconds,
        "checkpoint_mib": checkpoint.stat().st_size / MIB,
        **measurement.test,
        "curve": points,
    }
