"""What the post-processors make of scores, and of validation images with and without masks; what metrics see of it."""

from __future__ import annotations

import pytest
import torch
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.models import AnomalibModule

from kd_multiresolution import KdMultiresolution, KdMultiresolutionDual
from kd_multiresolution.plugin.post_processor import (
    FalseAlarmPostProcessor,
    NormalScores,
    RankEvaluator,
    UnclampedPostProcessor,
    bounded,
)

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


def test_a_process_without_normal_images_takes_part_in_what_is_computed_of_all() -> None:
    post_processor = UnclampedPostProcessor()
    batch = ImageBatch(
        image=torch.rand(1, 3, 4, 4),
        gt_label=torch.tensor([True]),
        pred_score=torch.tensor([1.0]),
        anomaly_map=torch.ones(1, 1, 4, 4),
    )
    post_processor.on_validation_batch_end(None, None, batch)
    assert post_processor._scores.update_called
    assert post_processor._normal_peak.update_called


def test_the_smallest_rate_has_a_finite_bound() -> None:
    assert NormalScores(mean=1.0, deviation=0.5, count=20).bound(0.01) < NormalScores(1.0, 0.5, 20).bound(1e-17) < 1e3


@pytest.mark.parametrize("count", [3, 30])
@pytest.mark.parametrize("rate", [0.01, 0.1])
def test_bound_is_exceeded_at_the_stated_rate(count: int, rate: float) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(4000, count + 1, generator=generator, dtype=torch.float64)
    above = [
        float(row[-1]) > NormalScores(float(row[:-1].mean()), float(row[:-1].std()), count).bound(rate)
        for row in scores
    ]
    assert sum(above) / len(above) == pytest.approx(rate, rel=0.35)


def test_threshold_is_one_half_and_the_mean_normal_image_a_quarter() -> None:
    processor = FalseAlarmPostProcessor(0.05)
    scores = NormalScores(mean=2.0, deviation=0.5, count=20)
    peaks = NormalScores(mean=5.0, deviation=1.5, count=20)
    processor.set_normal_scores(scores, peaks)
    for normal, *limits in (
        (scores, processor.image_min, processor.image_max, processor.image_threshold),
        (peaks, processor.pixel_min, processor.pixel_max, processor.pixel_threshold),
    ):
        raw = torch.tensor([normal.mean, normal.bound(0.05)])
        torch.testing.assert_close(processor._normalize(raw, *limits), torch.tensor([0.25, 0.5]))


def test_normalisation_keeps_the_order_beyond_the_validation_range() -> None:
    processor = UnclampedPostProcessor()
    scores = torch.tensor([0.0, 0.9, 1.0, 1.5, 2.0, 5.0, 50.0])
    limits = (torch.tensor(0.9), torch.tensor(1.1), torch.tensor(1.0))
    normalised = processor._normalize(scores, *limits)
    assert (normalised.diff() > 0).all()
    assert normalised[2] == 0.5
    assert 0 < normalised.min() <= normalised.max() < 1
    flat = processor._normalize(scores, *(torch.tensor(1.0),) * 3)
    assert (flat.diff() > 0).all()
    without = torch.tensor(float("nan"))
    assert torch.equal(processor._normalize(scores, without, without, without), scores)
    assert processor._normalize(None, *limits) is None


@pytest.mark.parametrize("model_class", [KdMultiresolution, KdMultiresolutionDual])
def test_metrics_see_bounded_scores_and_the_batch_stays_as_it_is(model_class: type[AnomalibModule]) -> None:
    evaluator = model_class.configure_evaluator()
    assert isinstance(evaluator, RankEvaluator)
    batch = ImageBatch(
        image=torch.zeros(4, 3, 8, 8), gt_label=torch.tensor([0, 0, 1, 1]),
        pred_score=torch.tensor([0.2, 30.0, 1.2, 90.0]), pred_label=torch.tensor([0, 1, 1, 1]),
    )  # fmt: skip
    evaluator.on_test_batch_end(None, None, None, batch, 0)
    assert batch.pred_score.tolist() == pytest.approx([0.2, 30.0, 1.2, 90.0])
    auroc = next(metric for metric in evaluator.test_metrics if metric.name == "image_AUROC")
    assert auroc.compute() == pytest.approx(0.75)
    assert bounded(torch.tensor([-1.0, 0.0, 3.0])).tolist() == [-0.5, 0.0, 0.75]


@pytest.mark.parametrize("post_processor", [UnclampedPostProcessor(), FalseAlarmPostProcessor()])
def test_batches_of_which_nobody_says_what_they_are_have_no_part_in_thresholds(
    post_processor: UnclampedPostProcessor,
) -> None:
    batch = ImageBatch(
        image=torch.rand(2, 3, 4, 4), pred_score=torch.tensor([1.0, 2.0]), anomaly_map=torch.rand(2, 1, 4, 4)
    )
    post_processor.on_validation_batch_end(None, None, batch)
    post_processor.on_validation_epoch_end(None, None)
    assert post_processor.image_threshold.isnan()
    assert post_processor.pixel_threshold.isnan()
    post_processor.on_test_batch_end(None, None, batch)
    assert batch.pred_label is None
    assert batch.pred_mask is None


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_a_model_of_another_precision_has_the_thresholds_that_were_fitted(precision: torch.dtype) -> None:
    processor = FalseAlarmPostProcessor(0.01)
    processor.set_normal_scores(NormalScores(18.7, 0.02, 30), NormalScores(5.01, 0.01, 30))
    before = {name: tensor.clone() for name, tensor in processor.named_buffers()}
    processor.to(precision)
    assert before
    for name, tensor in processor.named_buffers():
        assert torch.equal(tensor, before[name]), name
    assert all(tensor.is_meta for tensor in processor.to("meta").buffers()), "it goes where the model goes"


def test_the_only_defective_image_is_called_defective() -> None:
    post_processor = validated(masks=False)
    assert post_processor.image_threshold == pytest.approx(30), "half-way between 20 and 40"
    predictions = post_processor(InferenceBatch(pred_score=torch.tensor([10.0, 20.0, 29.9, 30.1, 40.0])))
    assert predictions.pred_label.tolist() == [False, False, False, True, True]


def test_of_normal_images_alone_none_is() -> None:
    post_processor = validated(masks=False, labels=(False, False, False))
    assert post_processor.image_threshold == pytest.approx(40)
    assert not post_processor(InferenceBatch(pred_score=torch.tensor([10.0, 40.0]))).pred_label.any()


def test_a_recorded_graph_has_the_labels_whose_thresholds_are_known() -> None:
    def recorded(post_processor: UnclampedPostProcessor) -> torch.Tensor | None:
        torch.compiler.reset()
        scores = InferenceBatch(pred_score=torch.tensor([10.0, 40.0]))
        return torch.compile(post_processor, backend="eager")(scores).pred_label

    fitted, loaded = validated(masks=False), UnclampedPostProcessor()
    assert recorded(loaded) is None
    assert recorded(fitted).tolist() == [False, True]
    loaded.load_state_dict(fitted.state_dict())
    assert recorded(loaded).tolist() == [False, True]
