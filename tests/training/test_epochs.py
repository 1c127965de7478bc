"""Nothing of one training is left in the next one, of the same objects, and nothing in the user's Trainer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from anomalib.data import Folder
from anomalib.engine import Engine
from lightning.pytorch import Callback, Trainer

from kd_multiresolution import ConvergenceStopping, EvaluationAfterConvergence, KdMultiresolution, KdMultiresolutionDual
from kd_multiresolution.results.protocol import RESULT_FILE

BOTH = (KdMultiresolution, KdMultiresolutionDual)
Model = KdMultiresolution | KdMultiresolutionDual


class Order(Callback):
    """Notes the images of every epoch in their order, and may end the training in its first step."""

    def __init__(self, *, fails: bool = False) -> None:
        self.fails = fails
        self.epochs: dict[int, list[str]] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.fails:
            msg = "no further"
            raise RuntimeError(msg)
        self.epochs.setdefault(trainer.current_epoch, []).extend(batch.image_path)


def make(kind: type[Model], epochs: int | None = 2, **arguments: Any) -> Model:
    return kind("small_vgg", image_size=32, epochs=epochs, visualizer=False, evaluator=False, **arguments)


def engine(folder: Path, *callbacks: Callback, **arguments: Any) -> Engine:
    settings = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu", **arguments}
    return Engine(default_root_dir=folder, callbacks=[*callbacks], **settings)


@pytest.mark.slow
@pytest.mark.parametrize("kind", BOTH)
def test_after_a_resumed_training_that_failed_one_begins_anew(kind: type[Model], data: Folder, tmp_path: Path) -> None:
    class Save(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "within.ckpt")

    expected, found = Order(), Order()
    engine(tmp_path / "first", expected, Save()).fit(make(kind), datamodule=data)
    network = make(kind)
    with pytest.raises(RuntimeError, match="no further"):
        engine(tmp_path / "failed", Order(fails=True)).fit(network, datamodule=data, ckpt_path=tmp_path / "within.ckpt")
    engine(tmp_path / "second", found).fit(network, datamodule=data)
    assert found.epochs == expected.epochs


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("given", [{}, {"max_epochs": -1}, {"max_epochs": 3}])
@pytest.mark.parametrize("fails", [False, True])
def test_the_trainer_is_as_the_user_made_it(
    kind: type[Model], given: dict[str, int], fails: bool, data: Folder, tmp_path: Path
) -> None:
    seen = []

    class Look(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            seen.append(trainer.max_epochs)

    runner = engine(tmp_path, Look(), Order(fails=fails), **given)
    try:
        runner.fit(make(kind, 2), datamodule=data)
    except RuntimeError:
        assert fails
    assert seen == [3 if given == {"max_epochs": 3} else 2]
    assert runner.trainer.max_epochs == given.get("max_epochs", 1000)


@pytest.mark.parametrize("kind", [ConvergenceStopping, partial(EvaluationAfterConvergence, evaluations=1)])
def test_a_stop_at_convergence_knows_nothing_of_the_training_before(
    kind: Callable[..., ConvergenceStopping], data: Folder, tmp_path: Path
) -> None:
    stopping = kind(window=2, tolerance=0.999)  # converged after four epochs, whatever the loss does
    for _ in range(2):
        runner = engine(tmp_path, stopping, max_epochs=9)
        runner.fit(make(KdMultiresolution, None, anomaly_map=None), datamodule=data)
        assert runner.trainer.current_epoch == 4
        result = Path(runner.trainer.default_root_dir) / RESULT_FILE
        assert result.is_file() == isinstance(stopping, EvaluationAfterConvergence)
