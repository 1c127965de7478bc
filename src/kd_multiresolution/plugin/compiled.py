"""A tested model compiled by torch: one graph, for a machine that tests or predicts many images."""

from __future__ import annotations

from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer


class CompiledEvaluation(Callback):
    """Has ``torch.compile`` compile the torch model, as one graph, when a test or a prediction begins.

    The first batch of each size takes minutes on a CPU. On a GPU ``reduce-overhead`` replays the graph as one launch.

    Args:
        mode: one of ``torch.compile``'s.
        backend: likewise.
    """

    def __init__(self, mode: str | None = None, backend: str = "inductor") -> None:
        self.mode = mode
        self.backend = backend
        self._found: Any = None

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compile the model, at its first batch."""
        del trainer
        self._found = cast("Any", pl_module).model._compiled_call_impl
        cast("Any", pl_module).model.compile(fullgraph=True, mode=self.mode, backend=self.backend)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do as :meth:`on_test_start`."""
        self.on_test_start(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the model as it was found."""
        del trainer
        cast("Any", pl_module).model._compiled_call_impl = self._found

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Do so as well where a test does not come to its end."""
        del exception
        if trainer.testing or trainer.predicting:
            self.on_test_end(trainer, pl_module)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do as :meth:`on_test_end`."""
        self.on_test_end(trainer, pl_module)
