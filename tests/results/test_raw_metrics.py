from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.metrics import auc, f1_score

from kd_multiresolution.results.raw_metrics import Predictions, covered_auroc, raw_metrics


def hand_made() -> Predictions:
    """Two normal and two anomalous images of 2 x 2 pixels; the pixels' order is easy to count."""
    masks = torch.zeros(4, 2, 2, dtype=torch.bool)
    masks[2, 0, 0] = masks[3, 0] = True
    maps = torch.arange(16.0).reshape(4, 1, 2, 2)
    return Predictions(torch.tensor([5.0, 900.0, 6.0, 1000.0]), torch.tensor([0, 0, 1, 1]), maps, masks, masks.float())


def test_figures_worked_out_by_hand() -> None:
    metrics = raw_metrics(hand_made())
    assert metrics["image_AUROC"] == pytest.approx(3 / 4)  # of four pairs, 6 < 900 alone is in the wrong order
    assert metrics["image_F1"] == pytest.approx(4 / 5)  # 6 as the threshold: two hits, one false alarm
    # Defective pixels: 8, 12, 13. Normal ones: 0 to 7, 9, 10, 11, 14, 15.
    assert metrics["pixel_AUROC"] == pytest.approx((8 + 11 + 11) / (3 * 13))
    # The same without 0 to 7: the images without a defect do not take part.
    assert metrics["pixel_AUROC_anomalous"] == pytest.approx((0 + 3 + 3) / (3 * 5))
    # From 15 down: the regions {8} and {12, 13} are met at false positive rates of 5/13 > 0.3, and of 2/13.
    rates, overlaps = [0, 2 / 13, 2 / 13, 0.3], [0, 0, 0.5, 0.5]
    assert metrics["AUPRO"] == pytest.approx(auc(rates, overlaps) / 0.3, abs=0.05)


def test_scores_are_neither_squashed_nor_rounded() -> None:
    """A sigmoid in single precision makes both scores 1; four digits make them equal."""
    scores = torch.tensor([40.0, 40.00002])
    assert scores[0] < scores[1]
    assert raw_metrics(Predictions(scores, torch.tensor([0, 1])))["image_AUROC"] == 1
    assert raw_metrics(Predictions(scores, torch.tensor([1, 0])))["image_AUROC"] == 0


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4)), min_size=2, max_size=30))
def test_partly_covered_pixels_count_on_both_sides_by_their_parts(pixels: list[tuple[int, int]]) -> None:
    """Four quarters of a pixel, each wholly covered or not, are the same."""
    scores, quarters = (torch.tensor(column) for column in zip(*pixels, strict=True))
    assume(0 < quarters.sum() < 4 * len(pixels))
    fractional = covered_auroc(scores.reshape(1, 1, -1), quarters.reshape(1, 1, -1) / 4)
    whole = (torch.arange(4) < quarters[:, None]).float().reshape(1, 1, -1)
    assert fractional == pytest.approx(covered_auroc(scores.repeat_interleave(4).reshape(1, 1, -1), whole))


def test_f1_is_the_largest_over_all_thresholds() -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 2, 40)
    scores = generator.normal(labels, 1.0)
    largest = max(f1_score(labels, scores >= threshold) for threshold in scores)
    found = raw_metrics(Predictions(torch.tensor(scores), torch.tensor(labels)))["image_F1"]
    assert found == pytest.approx(largest)


def test_what_there_is_decides_which_metrics_there_are() -> None:
    whole = hand_made()
    images_only = Predictions(whole.scores, whole.labels, whole.maps)
    assert set(raw_metrics(images_only)) == {"image_AUROC", "image_F1"}
    without_files = Predictions(whole.scores, whole.labels, whole.maps, whole.masks)
    assert set(raw_metrics(whole)) - set(raw_metrics(without_files)) == {"pixel_AUROC_anomalous"}


def test_images_of_one_kind_are_refused() -> None:
    with pytest.raises(ValueError, match="0 of 3 test images are anomalous"):
        raw_metrics(Predictions(torch.rand(3), torch.zeros(3)))
