"""The threshold of images as a raw score, and what it was told from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from anomalib.data import AnomalibDataModule
from anomalib.data.utils import ValSplitMode
from lightning.pytorch import LightningModule, Trainer

from kd_multiresolution.plugin.post_processor import FalseAlarmPostProcessor, UnclampedPostProcessor
from kd_multiresolution.plugin.threshold_data import ThresholdData
from kd_multiresolution.results.judged import MIDDLE, Scale

SPLITS = {
    ValSplitMode.SAME_AS_TEST.value: "the test images",
    ValSplitMode.FROM_TEST.value: "a part of the test folders",
    ValSplitMode.FROM_TRAIN.value: "a part of the training folder",
    ValSplitMode.SYNTHETIC.value: "synthetic defects on images of the training folder",
}
"""Where validation images come from, in words."""


@dataclass(frozen=True)
class Decision:
    """How images are told apart, in raw scores.

    Attributes:
        threshold: the raw score above which images are called defective; ``None`` if none are, or it is not known.
        middle: the raw score whose normalised one is 0.5, where normalised ones grow from 0 to 1 as ours do.
        span: the range of raw scores that was normalised; 0 where they are not normalised so.
        origin: what the threshold was told from, in a sentence; empty if there is none.
        optimistic: whether that was told from images that are nearer to the tested ones than tomorrow's will be.
    """

    threshold: float | None = None
    middle: float = 0.0
    span: float = 0.0
    origin: str = ""
    optimistic: bool = False

    @classmethod
    def of(cls, trainer: Trainer, pl_module: LightningModule) -> Decision:
        """Return how a test or a prediction, which has begun, tells images apart."""
        post_processor: Any = getattr(pl_module, "post_processor", None)
        scale = Scale.of(post_processor, "image")
        if scale.threshold is None:
            return cls()
        origin = _origin(trainer, pl_module)
        if scale.unit == "raw":
            return cls(scale.threshold, **origin)
        fitted = float(post_processor.image_threshold)
        span = float(post_processor.image_max - post_processor.image_min)
        if not isinstance(post_processor, UnclampedPostProcessor):
            # anomalib's is linear, up to where it is clamped.
            return cls(fitted + (scale.threshold - MIDDLE) * span, **origin)
        distance = 2 * (scale.threshold - MIDDLE)
        if abs(distance) >= 1:  # a sensitivity of 0 or 1, at which every image is called the same
            return cls(None, fitted, span, **origin)
        return cls(fitted + span / 2 * distance / (1 - abs(distance)), fitted, span, **origin)


def _origin(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    if said := getattr(pl_module, "threshold_origin", ""):
        return {"origin": said}
    if isinstance(pl_module.post_processor, FalseAlarmPostProcessor):
        said = (
            "The threshold was told from good images that were held out of the training folder. They were taken in "
            "the same session as those that the model has learnt from, so that later parts give more false alarms"
        )
        return {"origin": said, "optimistic": True}
    loop = trainer.predict_loop if trainer.predicting else trainer.test_loop
    data = loop._data_source.instance  # trainer.datamodule may be that of an earlier run
    if not isinstance(data, AnomalibDataModule):
        return {}
    # Of a checkpoint that does not say, or of another model, it is taken for the data that are here.
    told_from = getattr(pl_module, "threshold_data", None) or ThresholdData.of(data)
    if told_from.split not in SPLITS:
        return {}
    if not told_from.is_tested(data):
        return {"origin": f"Thresholds were told from other data, from {SPLITS[told_from.split]}"}
    if told_from.split == ValSplitMode.SAME_AS_TEST:
        said = "The images that are tested here are also those that thresholds are told from"
    else:
        said = f"Thresholds are told from {SPLITS[told_from.split]}, taken in the same session"
    return {"origin": said, "optimistic": True}
