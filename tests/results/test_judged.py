"""The scale of scores by the state of every post-processor, against the labels that it gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from anomalib.data import ImageBatch
from anomalib.post_processing import MEBinPostProcessor, PostProcessor
from torch import nn

from kd_multiresolution.plugin.post_processor import FalseAlarmPostProcessor, UnclampedPostProcessor
from kd_multiresolution.results.judged import JudgedRun, Scale

SCORES = [0.1, 0.45, 0.515, 0.525, 0.8, 2.0]


def fitted(post_processor: PostProcessor) -> PostProcessor:
    """Give it a threshold of 0.519 of raw scores, which lie between 0 and 1."""
    for kind in ("image", "pixel"):
        getattr(post_processor, f"_{kind}_threshold").fill_(0.519)
        if post_processor.enable_normalization:
            getattr(post_processor, f"{kind}_min").fill_(0.0)
            getattr(post_processor, f"{kind}_max").fill_(1.0)
    return post_processor


def batch() -> ImageBatch:
    scores = torch.tensor(SCORES)
    maps = scores[:, None, None].expand(-1, 16, 16).clone()
    return ImageBatch(image=torch.zeros(len(SCORES), 3, 16, 16), pred_score=scores, anomaly_map=maps)


POST_PROCESSORS: dict[str, tuple[Callable[..., PostProcessor], str]] = {
    "ours": (UnclampedPostProcessor, "normalised"),
    "ours, insensitive": (lambda: UnclampedPostProcessor(image_sensitivity=0.3, pixel_sensitivity=0.4), "normalised"),
    "ours, raw": (lambda: UnclampedPostProcessor(enable_normalization=False), "raw"),
    "of false alarms": (FalseAlarmPostProcessor, "normalised"),
    "of false alarms, raw": (lambda: FalseAlarmPostProcessor(enable_normalization=False), "raw"),
    "anomalib's": (PostProcessor, "normalised"),
    "anomalib's, sensitive": (lambda: PostProcessor(image_sensitivity=0.9, pixel_sensitivity=0.8), "normalised"),
    "anomalib's, raw": (lambda: PostProcessor(enable_normalization=False), "raw"),
    "MEBin": (lambda: MEBinPostProcessor(sample_rate=32, min_interval_len=1), "normalised"),
}


@pytest.mark.parametrize("name", POST_PROCESSORS)
def test_the_threshold_is_the_one_of_the_labels(name: str) -> None:
    make, unit = POST_PROCESSORS[name]
    post_processor = fitted(make())
    judged = batch()
    post_processor.post_process_batch(judged)
    scale = Scale.of(post_processor, "image")
    assert scale.unit == unit
    assert (judged.pred_score > scale.threshold).tolist() == judged.pred_label.tolist()
    of_pixels = Scale.of(post_processor, "pixel")
    if name != "MEBin":  # whose masks have a threshold of their own in each image
        assert torch.equal(judged.anomaly_map > of_pixels.threshold, judged.pred_mask)


def test_raw_scores_are_held_against_the_fitted_threshold() -> None:
    judged = batch()
    fitted(UnclampedPostProcessor(enable_normalization=False)).post_process_batch(judged)
    assert judged.pred_score.tolist() == pytest.approx(SCORES)
    assert judged.pred_label.tolist() == [score > 0.519 for score in SCORES]
    assert judged.pred_mask.flatten(1).any(1).tolist() == [score > 0.519 for score in SCORES]


def test_exported_labels_are_those_of_the_test() -> None:
    post_processor = fitted(UnclampedPostProcessor(enable_normalization=False))
    judged = batch()
    exported = post_processor(
        ImageBatch(image=judged.image, pred_score=judged.pred_score, anomaly_map=judged.anomaly_map)
    )
    post_processor.post_process_batch(judged)
    assert torch.equal(exported.pred_label, judged.pred_label)
    assert torch.equal(exported.pred_mask, judged.pred_mask)


def test_raw_scores_without_a_threshold_have_no_labels() -> None:
    judged = batch()
    UnclampedPostProcessor(enable_normalization=False).post_process_batch(judged)
    assert judged.pred_label is None
    assert judged.pred_mask is None


@pytest.mark.parametrize("name", ["image_sensitivity", "pixel_sensitivity"])
def test_a_sensitivity_of_raw_scores_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0.3.*threshold of normalised scores"):
        UnclampedPostProcessor(enable_normalization=False, **{name: 0.3})


def test_a_threshold_that_labels_do_not_use_is_told_apart() -> None:
    scale = Scale.of(fitted(PostProcessor(enable_normalization=False)), "image")
    assert scale.threshold == 0.5
    assert scale.fitted == pytest.approx(0.519)
    assert Scale.of(fitted(UnclampedPostProcessor(enable_normalization=False)), "image").fitted is None


@pytest.mark.parametrize("post_processor", [None, PostProcessor(), UnclampedPostProcessor()])
def test_without_a_fitted_threshold_scores_are_raw_and_labels_say_nothing(post_processor: PostProcessor | None) -> None:
    judged = batch()
    if post_processor is not None:
        post_processor.post_process_batch(judged)
    scale = Scale.of(post_processor, "image")
    assert (scale.unit, scale.threshold) == ("raw", None)
    run = JudgedRun(scale, Scale.of(post_processor, "pixel"))
    image = run.image(judged, 4)
    assert (image.label, image.predicted_mask) == (None, None)
    assert image.score == pytest.approx(0.8)


def test_thresholds_that_are_switched_off_are_none() -> None:
    scale = Scale.of(fitted(PostProcessor(enable_thresholding=False)), "image")
    assert (scale.unit, scale.threshold) == ("normalised", None)


def test_another_kind_of_post_processor_says_what_it_says() -> None:
    run = JudgedRun(Scale.of(nn.Identity(), "image"), Scale.of(nn.Identity(), "pixel"))
    assert run.scores == Scale("unknown")
    judged = batch()
    assert run.image(judged, 0).label is None
    judged.pred_label = torch.tensor(SCORES) > 0.6
    assert [run.image(judged, i).label for i in range(len(SCORES))] == [False, False, False, False, True, True]


def test_colours_have_the_threshold_in_the_middle_or_a_range_of_their_own() -> None:
    values = torch.tensor([[0.0, 0.25], [0.5, 4.0]])
    assert Scale("normalised", 0.7).colours(values.clamp(0, 1)).tolist() == [[0.0, 0.25], [0.5, 1.0]]
    assert Scale("raw", 0.25).colours(values).tolist() == [[0.0, 0.5], [1.0, 1.0]]
    for scale in (Scale("raw"), Scale("unknown")):
        assert scale.has_own_range(values)
        assert scale.colours(values).tolist() == [[0.0, 0.0625], [0.125, 1.0]]
        assert scale.marked(values, None) is None


def test_marks_are_the_post_processors() -> None:
    values = torch.tensor([[0.0, 0.6]])
    mask = torch.tensor([[True, False]])
    assert Scale("normalised", 0.5).marked(values, mask) is mask
    assert Scale("normalised").marked(values, None) is None
    assert (Scale("raw", 0.5, 0.7).marked(values, mask) > 0.5).tolist() == [[False, False]]
    assert (Scale("raw", 0.5, 0.4).marked(values, mask) > 0.5).tolist() == [[False, True]]
