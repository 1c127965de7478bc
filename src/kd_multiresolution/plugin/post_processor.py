"""Normalised scores that keep their order, and metrics that see it.

anomalib clamps normalised scores to [0, 1], so that all scores beyond the range of the validation set become equal; and
torchmetrics squashes a batch of scores with a sigmoid as soon as one of them lies outside [0, 1], and leaves the other
batches alone. Either changes an AUROC.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.metrics import Evaluator
from anomalib.post_processing import PostProcessor
from lightning.pytorch import LightningModule, Trainer
from scipy import stats
from torch import Tensor
from torchmetrics import CatMetric, MaxMetric

from kd_multiresolution.plugin.learnt import LearntNormals, distribution

logger = logging.getLogger(__name__)

FALSE_ALARM_RATE = 0.01
SENSITIVITY = 0.5  # anomalib's default, at which the threshold is the fitted one
HIGHEST_RATE = 0.5  # from there on the threshold would not lie above the mean normal image
SMALLEST_SPAN = 1e-30
PREDICTIONS = {"image": "pred_label", "pixel": "pred_mask"}  # what a threshold of each kind gives


@dataclass(frozen=True)
class NormalScores:
    """How the raw scores of held-out normal images are distributed.

    Attributes:
        mean: their mean.
        deviation: their sample standard deviation.
        count: how many there are, two or more.
        scores: those of this process's images.
    """

    mean: float
    deviation: float
    count: int
    scores: tuple[float, ...] = ()

    def bound(self, rate: float) -> float:
        """Return what one more image's score exceeds with this probability, if scores have a normal distribution."""
        quantile = float(stats.t.isf(rate, self.count - 1))
        return self.mean + quantile * self.deviation * math.sqrt(1 + 1 / self.count)


class UnclampedPostProcessor(PostProcessor):
    """anomalib's post-processor with a strictly increasing normalisation in place of the clamped one.

    As there, 0.5 is the threshold, and scores near it differ as much as there; far from it they approach 0 and 1.

    The threshold of pixels is fitted to masks. Without masks it is the highest value on normal validation images, so
    that nothing is marked on those.

    Thresholds and ranges stay in float32 whatever the model's precision is: rounded, they would lie elsewhere.

    With ``enable_normalization=False``, raw scores and maps are held against the thresholds as they were fitted; with
    anomalib's, against those of normalised ones.

    Args:
        enable_threshold_matching: take the threshold of images for pixels where those have none, and the other way
            round, as anomalib does. Here score and map are different quantities, so by default it is off.
        **kwargs: as anomalib's.

    Raises:
        ValueError: if a sensitivity, which moves the threshold of normalised scores, is given for raw ones.
    """

    remedy: ClassVar = "train the model with validation images, or validate it (anomalib validate, Engine.validate)"

    def __init__(self, *, enable_threshold_matching: bool = False, **kwargs: Any) -> None:
        super().__init__(enable_threshold_matching=enable_threshold_matching, **kwargs)
        self._normal_peak = MaxMetric()
        self._scores, self._labels = CatMetric(), CatMetric()
        self.note_thresholds()
        sensitivities = (self.image_sensitivity, self.pixel_sensitivity)
        if not self.enable_normalization and sensitivities != (SENSITIVITY, SENSITIVITY):
            msg = (
                f"image_sensitivity={sensitivities[0]!r}, pixel_sensitivity={sensitivities[1]!r}: both move the "
                "threshold of normalised scores. Leave them out, or leave out enable_normalization=False."
            )
            raise ValueError(msg)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> UnclampedPostProcessor:
        """Follow the model to another device, and not to another precision."""
        cast("Any", super())._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)
        return self

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Update the statistics, the scores, and the highest value on normal images without masks."""
        super().on_validation_batch_end(trainer, pl_module, outputs, *args, **kwargs)
        if outputs.gt_label is None:
            return
        if outputs.pred_score is not None:
            self._scores.update(outputs.pred_score)
            self._labels.update(outputs.gt_label)
        # Of a batch without normal images nothing, but every process has to take part in what is computed of all.
        normal = ~outputs.gt_label.bool()
        if outputs.anomaly_map is not None and outputs.gt_mask is None:
            self._normal_peak.update(outputs.anomaly_map[normal])

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute thresholds and ranges, and let the model know the scores of normal images.

        The threshold of images lies half-way between the lowest score that has the best F1, with all above it, and the
        next lower one: anomalib's is that score itself, which its own label, for what is above, then misses.
        """
        super().on_validation_epoch_end(trainer, pl_module)
        if self._scores.update_called:
            found, defective = self._scores.compute(), self._labels.compute().bool()
            if self.enable_thresholding and bool(defective.any()):  # without, it is the highest of normal images
                self._image_threshold.copy_(halfway_below(self._image_threshold, found))
            scores = distribution(found[~defective].tolist())
            learnt = getattr(pl_module, "learnt", None)
            if scores and isinstance(learnt, LearntNormals):  # other models know nothing
                cast("Any", pl_module).learnt = replace(learnt, origin="good validation images", scores=scores)
            self._scores.reset()
            self._labels.reset()
        if self._normal_peak.update_called:
            peak = self._normal_peak.compute()
            if self.enable_thresholding and bool(peak.isfinite()):  # not so without a normal image
                self._pixel_threshold.copy_(peak)
            self._normal_peak.reset()
        self.note_thresholds()

    def forget_pixels(self) -> None:
        """Know no threshold and range of pixels any more: they were those of other weights."""
        forget(self, "pixel")
        self.note_thresholds()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.note_thresholds()

    def note_thresholds(self) -> None:
        """Note which thresholds are known: a recorded graph has labels and masks for these, and cannot ask."""
        self._known = {kind: not bool(getattr(self, f"{kind}_threshold").isnan()) for kind in PREDICTIONS}

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say which labels will be missing."""
        del trainer
        self.note_thresholds()
        has_maps = getattr(cast("Any", pl_module).model, "anomaly_map", "") is not None
        missing = [kind for kind, known in self._known.items() if not known and (kind == "image" or has_maps)]
        if self.enable_thresholding and missing:
            logger.warning(
                "No threshold of %s is known, so there are no %s, and values are raw: %s.",
                " and ".join(f"{kind}s" for kind in missing),
                " and ".join({"image": "labels", "pixel": "masks"}[kind] for kind in missing),
                self.remedy,
            )

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do as :meth:`on_test_start`."""
        self.on_test_start(trainer, pl_module)

    def threshold_batch(self, batch: Any) -> None:
        """Give the batch labels and masks, as far as thresholds are known."""
        self.note_thresholds()
        given = {kind: getattr(batch, name) for kind, name in PREDICTIONS.items()}
        super().threshold_batch(batch)
        for kind, name in PREDICTIONS.items():
            if not self._known[kind]:
                setattr(batch, name, given[kind])

    def forward(self, predictions: InferenceBatch) -> InferenceBatch:
        """Return normalised scores and maps, with labels and masks as far as thresholds are known."""
        if not torch.compiler.is_compiling():
            self.note_thresholds()
        unknown = {PREDICTIONS[kind]: None for kind, known in self._known.items() if not known}
        return super().forward(predictions)._replace(**unknown)

    @property
    def normalized_image_threshold(self) -> Tensor:
        """Return the threshold of the scores that are given: raw ones if they are not to be normalised."""
        return super().normalized_image_threshold if self.enable_normalization else self.image_threshold

    @property
    def normalized_pixel_threshold(self) -> Tensor:
        """Return the threshold of the maps that are given."""
        return super().normalized_pixel_threshold if self.enable_normalization else self.pixel_threshold

    @staticmethod
    def _normalize(preds: Tensor | None, norm_min: Tensor, norm_max: Tensor, threshold: Tensor) -> Tensor | None:
        if preds is None:
            return None
        threshold = torch.where(torch.isnan(threshold), (norm_max + norm_min) / 2, threshold)
        span = norm_max - norm_min
        # All validation scores equal, and zero, maybe: any span keeps the order, if no quotient overflows.
        size = threshold.abs()
        span = torch.where(span > SMALLEST_SPAN, span, torch.where(size > SMALLEST_SPAN, size, 1.0))
        # As anomalib: without statistics (no validation ran) the raw scores pass.
        return torch.where(torch.isnan(norm_max - norm_min), preds, 0.5 + bounded((preds - threshold) / span * 2) / 2)


class FalseAlarmPostProcessor(UnclampedPostProcessor):
    """A normalisation in which 0.5 stands for a rate of false alarms, told from held-out normal images alone.

    Images and pixels have a threshold each: the stated fraction of normal images exceeds the one with its score, the
    other with the largest value of its map.

    Args:
        rate: fraction of normal images above the threshold, in (0, 0.5).

    Raises:
        ValueError: if the rate is out of range.
    """

    remedy: ClassVar = "train the model"

    def __init__(self, rate: float = FALSE_ALARM_RATE, **kwargs: Any) -> None:
        if not 0 < rate < HIGHEST_RATE:
            msg = f"false_alarm_rate={rate!r}: expected a fraction of normal images, above 0 and below {HIGHEST_RATE}."
            raise ValueError(msg)
        super().__init__(**kwargs)
        self.rate = rate

    def set_normal_scores(self, scores: NormalScores, peaks: NormalScores) -> None:
        """Set thresholds and ranges from normal images, by Student's prediction bound for one more image.

        It is exceeded at the stated rate however few images there are, if scores have a normal distribution and these
        images are as new to the cloners as that one.

        Args:
            scores: of the images.
            peaks: the largest values of their maps.
        """
        for kind, normal in (("image", scores), ("pixel", peaks)):
            threshold = normal.bound(self.rate)
            # The mean normal image comes to lie at 0.25.
            least, largest = normal.mean, 2 * threshold - normal.mean
            for name, number in ((f"_{kind}_threshold", threshold), (f"{kind}_min", least), (f"{kind}_max", largest)):
                getattr(self, name).fill_(number)
        self.note_thresholds()

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """Take nothing from validation images."""

    def on_validation_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        """Keep the threshold."""


def forget(post_processor: PostProcessor, *kinds: str) -> None:
    """Have a post-processor know no threshold and no range of images, of pixels, or of both."""
    for kind in kinds:
        for name in (f"_{kind}_threshold", f"{kind}_min", f"{kind}_max"):
            getattr(post_processor, name).fill_(torch.nan)


def halfway_below(threshold: Tensor, scores: Tensor) -> Tensor:
    """Return what lies half-way between a threshold and the next lower score, or the threshold if there is none.

    Example:
        >>> halfway_below(torch.tensor(4.0), torch.tensor([1.0, 2.0, 4.0, 5.0]))
        tensor(3.)
    """
    lower = scores[scores < threshold]
    return (threshold + lower.max()) / 2 if len(lower) else threshold


def renew_thresholds(checkpoint: dict[str, Any], post_processor: PostProcessor) -> None:
    """Put a post-processor's thresholds and ranges into a checkpoint.

    They are there twice: with the weights, and, since a post-processor is a callback too, among the callbacks' states,
    which Lightning restores last.
    """
    state = post_processor.state_dict()
    for copy in checkpoint.get("callbacks", {}).values():
        if "_image_threshold" in copy:
            copy.update({name: state[name] for name in copy if name in state})
    weights = checkpoint["state_dict"]
    prefix = "post_processor."
    weights.update({prefix + name: tensor for name, tensor in state.items() if prefix + name in weights})


def check_rate_unconfigured(post_processor: PostProcessor | bool, rate: float) -> None:
    """Check that no false alarm rate is asked for where our own post-processor, which it configures, is not used.

    Raises:
        ValueError: if one is.
    """
    if post_processor is not True and rate != FALSE_ALARM_RATE:
        msg = (
            f"false_alarm_rate={rate!r}: configures our own post-processor. Leave it out, or leave out "
            f"post_processor={post_processor!r}."
        )
        raise ValueError(msg)


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
