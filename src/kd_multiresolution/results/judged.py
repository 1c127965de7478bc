"""What a test or a prediction says of its images, in the words of what decided: the scale of scores, the labels."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from anomalib.data import ImageBatch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from kd_multiresolution.results.names import PictureNames
from kd_multiresolution.results.view import ModelView

MIDDLE = 0.5  # where a range of colours has the threshold, as anomalib's normalised maps have it


@dataclass(frozen=True)
class Scale:
    """The scale of scores, of images or of pixels, as a post-processor has left them.

    Attributes:
        unit: ``normalised``, ``raw``, or ``unknown``: a post-processor that is not made like anomalib's.
        threshold: the score, on this scale, above which the post-processor calls images or pixels defective; ``None``
            if it calls none so, or has no threshold that was fitted.
        fitted: the threshold that was fitted, where labels come from another one: anomalib's own post-processor holds
            raw scores against the threshold of normalised ones.
    """

    unit: Literal["normalised", "raw", "unknown"] = "unknown"
    threshold: float | None = None
    fitted: float | None = None

    @classmethod
    def of(cls, post_processor: Any, kind: Literal["image", "pixel"]) -> Scale:
        """Return the scale of the scores of images, or of pixels, that a post-processor gives."""
        if post_processor is None:
            return cls("raw")
        names = (f"{kind}_min", f"{kind}_max", f"{kind}_threshold", f"normalized_{kind}_threshold")
        try:
            least, largest, fitted, threshold = (float(getattr(post_processor, name)) for name in names)
            normalizes, decides = post_processor.enable_normalization, post_processor.enable_thresholding
        except AttributeError:
            return cls()
        normalised = bool(normalizes) and math.isfinite(largest - least)
        unit: Literal["normalised", "raw"] = "normalised" if normalised else "raw"
        if not decides or not math.isfinite(fitted):
            return cls(unit)
        return cls(unit, threshold, None if normalised or fitted == threshold else fitted)

    @property
    def decides(self) -> bool:
        """Whether labels say anything; with a threshold that was never fitted, anomalib's post-processor gives some."""
        return self.unit == "unknown" or self.threshold is not None

    def colours(self, anomaly_map: Tensor) -> Tensor:
        """Return a map as places in a range of colours, in [0, 1].

        A normalised map as it is; a raw one in multiples of its threshold, which has the middle; one without a
        threshold, or of which nothing is known, in its own range unless that is [0, 1].
        """
        values = anomaly_map.detach().as_subclass(Tensor).float().cpu()
        if self.has_own_range(values):
            values = (values - values.min()) / (values.max() - values.min()).clamp_min(torch.finfo(values.dtype).tiny)
        elif self.unit == "raw":
            values = values * (MIDDLE / self._middle)
        return values.clamp(0, 1)

    def has_own_range(self, anomaly_map: Tensor) -> bool:
        """Return whether the colours of a map cannot be compared with those of another."""
        if self.unit == "raw":
            return self._middle <= 0
        return bool(anomaly_map.min() < 0 or anomaly_map.max() > 1)

    def marked(self, anomaly_map: Tensor, predicted_mask: Tensor | None) -> Tensor | None:
        """Return which pixels are called defective, (H, W): above 0.5; ``None`` if nothing says.

        Args:
            anomaly_map: of the image.
            predicted_mask: that the post-processor gave, if it did. Where it held maps against another threshold than
                the fitted one, the fitted one is taken.
        """
        if not self.decides or self.has_own_range(anomaly_map):
            return None
        if predicted_mask is not None and self.fitted is None:
            return predicted_mask
        return None if self.unit == "unknown" else self.colours(anomaly_map)

    @property
    def _middle(self) -> float:
        """The threshold in the middle of a raw map's colours; 0 if there is none."""
        return self.fitted or self.threshold or 0.0


@dataclass
class JudgedImage:
    """An image, and what was said of it; tensors are on the host and in the frame of what the model saw.

    Attributes:
        path: its file, or its name in a data set in memory; empty if there is neither.
        name: as much of it as tells the images of the run apart.
        image: as the model was given it, (3, H, W).
        score: on the scale of the run.
        label: whether the post-processor called it defective; ``None`` if it said nothing.
        truth: whether it is; ``None`` if that is not known.
        true_mask: (H, W), bool, if there is one.
        predicted_mask: (H, W), bool, if there is one.
        anomaly_map: (H, W), on the scale of the run, if there is one.
    """

    path: str
    name: str
    image: Tensor
    score: float
    label: bool | None = None
    truth: bool | None = None
    true_mask: Tensor | None = None
    predicted_mask: Tensor | None = None
    anomaly_map: Tensor | None = None


@dataclass
class JudgedRun:
    """What all images of a test or a prediction have in common.

    Attributes:
        scores: the scale of images.
        maps: the scale of pixels.
        view: shows what the model saw.
        names: tells the images apart.
    """

    scores: Scale = field(default_factory=Scale)
    maps: Scale = field(default_factory=Scale)
    view: ModelView = field(default_factory=ModelView)
    names: PictureNames = field(default_factory=PictureNames)

    @classmethod
    def of(cls, trainer: Trainer, pl_module: LightningModule) -> JudgedRun:
        """Return a run, which has begun."""
        post_processor = getattr(pl_module, "post_processor", None)
        return cls(
            Scale.of(post_processor, "image"),
            Scale.of(post_processor, "pixel"),
            ModelView.of_run(trainer, getattr(pl_module, "pre_processor", None)),
            PictureNames.of_run(trainer),
        )

    def image(self, batch: ImageBatch, index: int) -> JudgedImage:
        """Return an image of a batch that was post-processed."""

        def of(name: str) -> Any:
            values = getattr(batch, name, None)
            return None if values is None else values[index]

        def flag(name: str) -> bool | None:
            value = of(name)
            return None if value is None else bool(value)

        def plane(name: str) -> Tensor | None:
            value = of(name)
            return None if value is None else value.detach().as_subclass(Tensor).cpu().reshape(value.shape[-2:])

        path = of("image_path")
        return JudgedImage(
            path=str(path or ""),
            name=self.names(path) if path else "",
            image=of("image").detach().as_subclass(Tensor).cpu(),
            score=float(of("pred_score")),
            label=flag("pred_label") if self.scores.decides else None,
            truth=flag("gt_label"),
            true_mask=plane("gt_mask"),
            predicted_mask=plane("pred_mask") if self.maps.decides else None,
            anomaly_map=plane("anomaly_map"),
        )
