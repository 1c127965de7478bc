"""What the post-processor makes of validation images with and without masks."""

from __future__ import annotations

import pytest
import torch
from anomalib.data import ImageBatch, InferenceBatch

from kd_multiresolution.plugin.post_processor import UnclampedPostProcessor

PEAKS = (0.2, 0.3, 0.9)  # of the maps; the last image is defective


def validated(*, masks: bool, labels: tuple[bool, ...] = (False, False, True)) -> UnclampedPostProcessor:
    maps = torch.zeros(len(PEAKS), 1, 4, 4)
    maps[:, 0, 1, 2] = torch.tensor(PEAKS)
    batch = ImageBatch(
        image=torch.rand(len(PEAKS), 3, 4, 4),
        gt_label=torch.tensor(labels),
        gt_mask=(maps[:, 0] > 0.5) if masks else None,
        pred_score=torch.tensor([10.0, 20.0, 40.0]),
        anomaly_map=maps,
    )
    post_processor = UnclampedPostProcessor()
    post_processor.on_validation_batch_end(None, None, batch)
    post_processor.on_validation_epoch_end(None, None)
    return post_processor


def test_without_masks_nothing_on_a_normal_image_is_marked() -> None:
    post_processor = validated(masks=False)
    assert post_processor.pixel_threshold == pytest.approx(0.3)
    maps = torch.tensor([[[0.29, 0.31]]])
    predictions = post_processor(InferenceBatch(pred_score=torch.tensor([1.0]), anomaly_map=maps))
    assert predictions.pred_mask.flatten().tolist() == [False, True]


def test_masks_fit_the_threshold() -> None:
    assert validated(masks=True).pixel_threshold == pytest.approx(0.9)


def test_without_masks_and_normal_images_there_is_no_threshold_of_pixels() -> None:
    post_processor = validated(masks=False, labels=(True, True, True))
    assert post_processor.pixel_threshold.isnan(), "the threshold of scores, 10 or more, says nothing about maps"
