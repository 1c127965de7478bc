"""Metrics on raw scores and maps: no rounding, no clamp, no squashing on the way (Sec. 4 of arXiv 2011.11108)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from anomalib.data import ImageBatch
from anomalib.metrics import AUPRO
from numpy.typing import ArrayLike
from sklearn.metrics import precision_recall_curve, roc_auc_score
from torch import Tensor

AUPRO_LIMIT = 0.3  # of the false positive rate, as for MVTec AD


@dataclass(frozen=True)
class Predictions:
    """What a model says about a test set, and the truth, on the host.

    Attributes:
        scores: raw anomaly scores, (N,).
        labels: 0 for normal images, 1 for anomalous ones, (N,).
        maps: raw anomaly maps, (N, 1, H, W); ``None`` for a model or a data set without them.
        masks: binary masks of the defects, (N, H, W), bool; ``None`` for a data set without them.
        coverage: how much of each pixel the defect covers, (N, H, W), in [0, 1]: the mask file resized with the image
            and not rounded. ``None`` for a data set without mask files.
    """

    scores: Tensor
    labels: Tensor
    maps: Tensor | None = None
    masks: Tensor | None = None
    coverage: Tensor | None = None


def raw_metrics(predictions: Predictions) -> dict[str, float]:
    """Return all metrics that the predictions allow, each in [0, 1].

    ``image_AUROC`` and ``image_F1`` (the largest over all thresholds) need scores only; ``pixel_AUROC`` (all images,
    binary masks) and ``AUPRO`` maps and masks; ``pixel_AUROC_anomalous``, the paper's convention, mask files: anomalous
    images only, and a pixel that a defect covers in part counts on both sides, by its parts.

    Raises:
        ValueError: if all images, or all pixels, are of one kind.
    """
    labels, scores = predictions.labels.numpy(), predictions.scores.double().numpy()
    check_both_kinds(int(labels.sum()), len(labels), "images")
    metrics = {"image_AUROC": float(roc_auc_score(labels, scores)), "image_F1": _largest_f1(labels, scores)}
    if predictions.maps is None or predictions.masks is None:
        return metrics
    maps, masks = predictions.maps.squeeze(1), predictions.masks
    check_both_kinds(int(masks.sum()), masks.numel(), "pixels")
    metrics["pixel_AUROC"] = float(roc_auc_score(masks.flatten().numpy(), maps.flatten().numpy()))
    metrics["AUPRO"] = _aupro(maps, masks)
    if predictions.coverage is not None:
        anomalous = predictions.labels.bool()
        metrics["pixel_AUROC_anomalous"] = covered_auroc(maps[anomalous], predictions.coverage[anomalous])
    return metrics


def covered_auroc(maps: Tensor, coverage: Tensor) -> float:
    """Return the AUROC of pixels of which a defect covers a part.

    A pixel covered by the part c is positive with weight c and negative with weight 1 - c; for c of 0 and 1 alone this
    is the usual AUROC.

    Args:
        maps: (N, H, W), any range.
        coverage: (N, H, W), in [0, 1].

    Example:
        >>> covered_auroc(torch.tensor([[[0.1, 0.2]]]), torch.tensor([[[0.0, 1.0]]]))
        1.0
    """
    scores, positive = maps.flatten().double().numpy(), coverage.flatten().double().numpy()
    has_positive, has_negative = positive > 0, positive < 1
    labels = np.repeat([1, 0], [has_positive.sum(), has_negative.sum()])
    weights = np.concatenate([positive[has_positive], 1 - positive[has_negative]])
    scores = np.concatenate([scores[has_positive], scores[has_negative]])
    return float(roc_auc_score(labels, scores, sample_weight=weights))


def _largest_f1(labels: ArrayLike, scores: ArrayLike) -> float:
    precision, recall, _ = precision_recall_curve(labels, scores)
    # Where both are zero the sum is zero too; F1 is zero there.
    return float(np.max(2 * precision * recall / np.maximum(precision + recall, np.finfo(float).tiny)))


def _aupro(maps: Tensor, masks: Tensor) -> float:
    metric = AUPRO(fields=["anomaly_map", "gt_mask"], fpr_limit=AUPRO_LIMIT)
    images = torch.zeros(len(maps), 3, 1, 1)  # the batch wants some
    metric.update(ImageBatch(image=images, anomaly_map=maps, gt_mask=masks))
    return float(metric.compute())


def check_both_kinds(anomalous: int, count: int, what: str) -> None:
    """Raise a ``ValueError`` if all of a test set's images or pixels are normal, or all are anomalous."""
    if not 0 < anomalous < count:
        msg = f"{anomalous} of {count} test {what} are anomalous: metrics need normal and anomalous ones."
        raise ValueError(msg)
