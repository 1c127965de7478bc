"""Normalised scores that keep their order, and metrics that see it.

anomalib clamps normalised scores to [0, 1], so that all scores beyond the range of the validation set become equal; and
torchmetrics squashes a batch of scores with a sigmoid as soon as one of them lies outside [0, 1], and leaves the other
batches alone. Either changes an AUROC.
"""

from __future__ import annotations

from typing import Any

import torch
from anomalib.data import ImageBatch
from anomalib.metrics import Evaluator
from anomalib.post_processing import PostProcessor
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor


class UnclampedPostProcessor(PostProcessor):
    """anomalib's post-processor with a strictly increasing normalisation in place of the clamped one.

    As there, 0.5 is the threshold, and scores near it differ as much as there; far from it they approach 0 and 1.
    """

    @staticmethod
    def _normalize(preds: Tensor | None, norm_min: Tensor, norm_max: Tensor, threshold: Tensor) -> Tensor | None:
        if preds is None:
            return None
        threshold = torch.where(torch.isnan(threshold), (norm_max + norm_min) / 2, threshold)
        span = norm_max - norm_min
        # All validation scores equal: any positive span keeps the order.
        span = torch.where(span > 0, span, threshold.abs().clamp_min(torch.finfo(span.dtype).tiny))
        # As anomalib: without statistics (no validation ran) the raw scores pass.
        return torch.where(torch.isnan(span), preds, 0.5 + bounded((preds - threshold) / span * 2) / 2)


class RankEvaluator(Evaluator):
    """anomalib's evaluator, with scores and maps brought into (-1, 1) by :func:`bounded` before any metric sees them.

    Scores that are >= 0, raw or normalised, are then never squashed again, and ranking metrics are theirs.
    """

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: ImageBatch, *args: Any, **kwargs: Any
    ) -> None:
        """Update the validation metrics."""
        super().on_validation_batch_end(trainer, pl_module, outputs, _bounded_batch(batch), *args, **kwargs)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: ImageBatch, *args: Any, **kwargs: Any
    ) -> None:
        """Update the test metrics."""
        super().on_test_batch_end(trainer, pl_module, outputs, _bounded_batch(batch), *args, **kwargs)


def bounded(x: Tensor) -> Tensor:
    """Return x / (1 + |x|): strictly increasing, in (-1, 1), of slope 1 at zero."""
    return x / (1 + x.abs())


def _bounded_batch(batch: ImageBatch) -> ImageBatch:
    fields = {name: getattr(batch, name) for name in ("pred_score", "anomaly_map")}
    present = {name: bounded(field) for name, field in fields.items() if field is not None}
    copy: ImageBatch = batch.update(in_place=False, **present)
    return copy
