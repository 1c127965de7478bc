"""Says once, in numbers, when images that are tested or predicted are no longer like those that were learnt."""

from __future__ import annotations

import logging
import math
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer

from kd_multiresolution.plugin.learnt import LearntNormals
from kd_multiresolution.plugin.pictures import STATISTICS
from kd_multiresolution.results.changes import picture_change, score_change, share_change
from kd_multiresolution.results.decision import Decision
from kd_multiresolution.training.batches import of_all_processes

logger = logging.getLogger(__name__)


class DriftWarning(Callback):
    """Holds images and their raw scores against what normal ones were like in training, and warns in the log.

    Where labels say which images are defective, good ones alone are looked at. It stands before the post-processor,
    which changes scores in place.
    """

    def __init__(self) -> None:
        self._scores: list[float] = []
        self._pictures: dict[str, list[float]] = {}

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier run."""
        del trainer, pl_module
        self._scores, self._pictures = [], {name: [] for name in STATISTICS}

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do as :meth:`on_test_start`."""
        self.on_test_start(trainer, pl_module)

    def _on_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        del trainer, batch, args, kwargs
        module = cast("Any", pl_module)
        if not _has_learnt(pl_module):
            return
        labels = outputs.gt_label
        good = [True] * outputs.batch_size if labels is None else (~labels.bool()).flatten().tolist()
        found = module.picture_statistics(outputs.image)
        for name, values in found.items():
            self._pictures[name] += [value for value, is_good in zip(values, good, strict=True) if is_good]
        scores = outputs.pred_score.detach().flatten().tolist()
        self._scores += [score for score, is_good in zip(scores, good, strict=True) if is_good]

    on_test_batch_end = on_predict_batch_end = _on_batch_end

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if anything has changed."""
        if not _has_learnt(pl_module):
            return
        learnt: LearntNormals = cast("Any", pl_module).learnt
        scores = of_all_processes(trainer, self._scores)
        pictures = {name: of_all_processes(trainer, values) for name, values in self._pictures.items()}
        if not trainer.is_global_zero:
            return
        decided = Decision.of(trainer, pl_module).threshold
        threshold = math.nan if decided is None else decided
        found = [
            *(picture_change(name, learnt.pictures.get(name, ()), values) for name, values in pictures.items()),
            score_change(learnt.scores, scores, threshold),
            share_change(learnt.scores, scores, threshold),
        ]
        said = [change for change in found if change is not None]
        if said:
            logger.warning(
                "%d images are no longer like those that the model has learnt from: %s. Look at light, focus and "
                "position, or at what is being made; if they are good, set the threshold again, or train anew.",
                len(scores),
                "; ".join(said),
            )

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do as :meth:`on_test_end`."""
        self.on_test_end(trainer, pl_module)


def _has_learnt(pl_module: LightningModule) -> bool:
    """Return whether a model knows what normal images were like; another one in the same trainer does not."""
    learnt = getattr(pl_module, "learnt", None)
    return isinstance(learnt, LearntNormals) and learnt != LearntNormals()
