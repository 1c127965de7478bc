"""What is no number never passes as a score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from anomalib.data import InferenceBatch
from torch import Tensor

SICK_IMAGE = "its pixels are not finite; check the file, or the transform that it went through"
SICK_MODEL = "its pixels are finite, so weights or arithmetic are not: lower learning_rate, or use a higher precision"


class NonFiniteError(ValueError):
    """Images have a score or a map that is not finite.

    Args:
        reasons: why, by the image's position in the batch.
        names: what to call the images; default: by position.
    """

    def __init__(self, reasons: dict[int, str], names: Sequence[str] | None = None) -> None:
        self.reasons = reasons
        images = "; ".join(f"{names[i] if names else f'image {i} of the batch'}: {why}" for i, why in reasons.items())
        super().__init__(f"No finite anomaly score or map. {images}.")


def checked_predictions(predictions: InferenceBatch, images: Tensor) -> InferenceBatch:
    """Return predictions that are all finite; an exported model cannot raise, and goes without.

    It reads values, for which the host waits until they are computed: it stands where predictions are used, not within
    a network, whose graph it would break.

    Args:
        predictions: scores (N,), and maps (N, 1, H, W) or ``None``.
        images: what they were told from, (N, C, H, W).

    Raises:
        NonFiniteError: if one is not finite.
    """
    if torch.compiler.is_compiling():
        return predictions
    finite = cast("Tensor", predictions.pred_score).isfinite()
    if predictions.anomaly_map is not None:
        finite = finite & predictions.anomaly_map.isfinite().flatten(1).all(1)
    if not bool(finite.all()):
        sick = (~finite).nonzero().flatten().tolist()
        raise NonFiniteError({i: SICK_MODEL if bool(images[i].isfinite().all()) else SICK_IMAGE for i in sick})
    return predictions


def check_finite(images: Tensor, names: Sequence[str]) -> None:
    """Check that images, (N, C, H, W), are finite.

    Raises:
        ValueError: if one is not; it is named.
    """
    finite = images.isfinite().flatten(1).all(1).tolist()
    for name, is_finite in zip(names, finite, strict=True):
        if not is_finite:
            msg = f"{name}: {SICK_IMAGE}."
            raise ValueError(msg)
