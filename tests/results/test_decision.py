from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from anomalib.data import Folder
from anomalib.post_processing import MEBinPostProcessor, PostProcessor

from kd_multiresolution.plugin.post_processor import FalseAlarmPostProcessor, UnclampedPostProcessor
from kd_multiresolution.plugin.threshold_data import ThresholdData
from kd_multiresolution.results.decision import Decision
from tests.data.generated import write_noise_folders

SCORES = torch.linspace(0, 8, 81, dtype=torch.float64)


def trainer(data: Any = None) -> Any:
    return SimpleNamespace(predicting=False, test_loop=SimpleNamespace(_data_source=SimpleNamespace(instance=data)))


def fitted(post_processor: Any) -> Any:
    for name, value in (("_image_threshold", 3.0), ("image_min", 1.0), ("image_max", 6.0)):
        getattr(post_processor, name).fill_(value)
    return post_processor


@pytest.mark.parametrize(
    "post_processor",
    [
        UnclampedPostProcessor(),
        UnclampedPostProcessor(image_sensitivity=0.3),
        UnclampedPostProcessor(image_sensitivity=0.8),
        UnclampedPostProcessor(enable_normalization=False),
        FalseAlarmPostProcessor(),
        PostProcessor(),
        PostProcessor(image_sensitivity=0.4),
        PostProcessor(enable_normalization=False),
    ],
)
def test_the_raw_threshold_is_the_one_that_labels_are_given_by(post_processor: Any) -> None:
    fitted(post_processor)
    batch = SimpleNamespace(pred_score=SCORES, anomaly_map=None, pred_label=None, pred_mask=None)
    post_processor.post_process_batch(batch)
    decision = Decision.of(trainer(), SimpleNamespace(post_processor=post_processor))
    # One of the scores may be the threshold, but for rounding.
    sure = (SCORES - decision.threshold).abs() > 1e-6
    assert ((decision.threshold < SCORES) == batch.pred_label)[sure].all()
    assert sure.sum() >= len(SCORES) - 1


def test_the_axis_is_our_normalisation() -> None:
    post_processor = fitted(UnclampedPostProcessor(image_sensitivity=0.3))
    decision = Decision.of(trainer(), SimpleNamespace(post_processor=post_processor))
    assert (decision.middle, decision.span) == (3, 5)
    x = 2 * (SCORES - decision.middle) / decision.span
    batch = SimpleNamespace(pred_score=SCORES, anomaly_map=None)
    post_processor.normalize_batch(batch)
    torch.testing.assert_close(0.5 + x / (1 + x.abs()) / 2, batch.pred_score)


@pytest.mark.parametrize(
    "post_processor",
    [None, UnclampedPostProcessor(), fitted(UnclampedPostProcessor(enable_thresholding=False)), MEBinPostProcessor()],
)
def test_without_a_threshold_there_is_no_decision(post_processor: Any) -> None:
    assert Decision.of(trainer(), SimpleNamespace(post_processor=post_processor)) == Decision()


def test_held_out_training_images_are_of_the_same_session() -> None:
    decision = Decision.of(trainer(), SimpleNamespace(post_processor=fitted(FalseAlarmPostProcessor())))
    assert "held out of the training folder" in decision.origin
    assert decision.optimistic


def test_a_threshold_that_was_set_again_is_not_optimistic() -> None:
    module = SimpleNamespace(post_processor=fitted(FalseAlarmPostProcessor()), threshold_origin="It was set again")
    decision = Decision.of(trainer(), module)
    assert decision.origin == "It was set again"
    assert not decision.optimistic


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("same_as_test", "images that are tested here"),
        ("from_test", "a part of the test folders"),
        ("from_train", "a part of the training folder"),
        ("synthetic", "synthetic defects"),
        ("none", ""),
    ],
)
def test_validation_images_of_the_test_are_said_to_be_optimistic(mode: str, said: str, tmp_path: Path) -> None:
    march = folder(tmp_path / "march", mode)
    module = SimpleNamespace(post_processor=fitted(UnclampedPostProcessor()), threshold_data=ThresholdData.of(march))
    for data in (march, folder(tmp_path / "march", mode)):  # of the second one the split is drawn anew
        decision = Decision.of(trainer(data), module)
        assert said in decision.origin
        assert decision.optimistic == bool(said) == bool(decision.origin)
    # What is tested now says nothing about thresholds of other images.
    later = Decision.of(trainer(folder(tmp_path / "june", "same_as_test")), module)
    assert not later.optimistic
    assert ("from other data" in later.origin) == bool(said)
    # Where nothing is known of them, as of older checkpoints, it does.
    module.threshold_data = ThresholdData.of_entry(None)
    older = Decision.of(trainer(march), module)
    assert older == decision


def folder(root: Path, mode: str) -> Folder:
    if not root.exists():
        write_noise_folders(root, 6)
    data = Folder("name", root=root, normal_dir="good", abnormal_dir="bad", val_split_mode=mode, num_workers=0)
    data.setup()
    return data
