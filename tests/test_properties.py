"""What holds for every image: over shapes, types, batch sizes and contents."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kd_multiresolution import AnomalyMapGenerator, KdMultiresolutionModel, discrepancy
from kd_multiresolution.dual.torch_model import KdMultiresolutionDualModel
from kd_multiresolution.paper.discrepancy import local_discrepancy
from kd_multiresolution.plugin.finite import NonFiniteError, checked_predictions
from kd_multiresolution.plugin.post_processor import UnclampedPostProcessor

pytestmark = pytest.mark.slow

STRIDE = 16
KINDS: dict[str, dict[str, Any]] = {
    "gradient": {},
    "cloner's gradient": {"attribution_path": "cloner", "percentile_scale": True},
    "guided": {"anomaly_map": "guided_backprop", "attribution_path": "cloner"},
    "discrepancy": {"anomaly_map": "discrepancy"},
    "value alone": {"anomaly_map": "discrepancy", "terms": "value"},
    "dual": {},
}
KIND = st.sampled_from(list(KINDS))
MANY = settings(max_examples=40, deadline=None, derandomize=True)


@cache
def model(kind: str) -> KdMultiresolutionModel | KdMultiresolutionDualModel:
    points = ["pool2", "pool3", "pool4"]
    if kind == "dual":
        return KdMultiresolutionDualModel("small_vgg", critical_points=points, sigma=2.0).eval()
    return KdMultiresolutionModel("small_vgg", critical_points=points, sigma=2.0, **KINDS[kind]).eval()


@st.composite
def pictures(draw: st.DrawFn) -> Tensor:
    """Return one picture, (1 or 3, H, W): noise, flat, striped, or black but for a pixel; of any range."""
    channels = draw(st.sampled_from([1, 3]))
    height, width = (STRIDE * draw(st.integers(2, 4)) for _ in range(2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    scale, offset = draw(st.sampled_from([(1.0, 0.0), (4.5, -2.1), (1e-6, 0.5), (255.0, 0.0)]))
    content = draw(st.sampled_from(["noise", "flat", "stripes", "point"]))
    picture = torch.zeros(channels, height, width)
    if content == "noise":
        picture = torch.rand(channels, height, width, generator=generator)
    elif content == "flat":
        picture += draw(st.floats(0, 1, width=32))
    elif content == "stripes":
        picture[..., :: draw(st.integers(2, 9))] = 1
    else:
        picture[:, draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))] = 1
    return scale * picture + offset


@st.composite
def batches(draw: st.DrawFn) -> Tensor:
    """Return up to four pictures of one size, of any float type."""
    first = draw(pictures())
    others = [draw(st.sampled_from([first.flip(-1), first.flip(-2), 1 - first, torch.rand_like(first)])) for _ in "123"]
    batch = torch.stack([first, *others][: draw(st.integers(1, 4))])
    return batch.to(draw(st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])))


@MANY
@given(KIND, batches())
def test_scores_and_maps_are_finite_and_not_negative(kind: str, images: Tensor) -> None:
    scores, _, maps, _ = model(kind)(images)
    assert scores.shape == (len(images),)
    assert maps.shape == (len(images), 1, *images.shape[-2:])
    for numbers in (scores, maps):
        assert numbers.isfinite().all()
        assert (numbers >= 0).all()


@MANY
@given(KIND, batches(), st.randoms(use_true_random=False))
def test_a_score_depends_neither_on_the_others_nor_on_their_order(kind: str, images: Tensor, random: Any) -> None:
    scores = model(kind)(images).pred_score
    order = random.sample(range(len(images)), len(images))
    close = {"rtol": 1e-4, "atol": 1e-6 * float(scores.max())}
    torch.testing.assert_close(model(kind)(images[order]).pred_score, scores[order], **close)
    for index in order[:2]:
        torch.testing.assert_close(model(kind)(images[index][None]).pred_score, scores[[index]], **close)


@MANY
@given(KIND, batches(), st.sampled_from([float("nan"), float("inf")]), st.integers(0, 10**6))
def test_no_score_comes_of_what_is_no_number(kind: str, images: Tensor, value: float, place: int) -> None:
    sick = place % len(images)
    images[sick].view(-1)[place % images[sick].numel()] = value
    with pytest.raises(
        NonFiniteError, match=rf"map\. image {sick} of the batch: its pixels are not finite[^;]*; [^;]*$"
    ):
        checked_predictions(model(kind)(images), images)


FEATURES = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))


@MANY
@given(FEATURES, st.sampled_from([0.0, 1e-20, 1.0, 1e15]), st.sampled_from([0.0, 1e-20, 1.0, 1e15]), st.integers(0, 99))
def test_discrepancies_are_finite_and_not_negative(
    shape: tuple[int, int, int, int], scale: float, other: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    source, cloner = (factor * torch.randn(shape, generator=generator) for factor in (scale, other))
    whole = discrepancy([source], [cloner], value_weight=0.5)
    (local,) = local_discrepancy([source], [cloner], value_weight=0.5)
    for numbers in (whole, local):
        assert numbers.isfinite().all()
        assert (numbers >= 0).all()
    if scale == 1:  # zero vectors, and such as are no longer, have no direction
        same = discrepancy([source], [source], value_weight=0.5)
        torch.testing.assert_close(same, torch.zeros(shape[0]), rtol=0, atol=1e-6)


@MANY
@given(
    st.floats(-1e6, 1e6, width=32), st.integers(8, 40), st.integers(8, 40), st.booleans(), st.sampled_from([0.0, 2.0])
)
def test_a_constant_attribution_has_a_constant_map(
    value: float, height: int, width: int, scaled: bool, sigma: float
) -> None:
    maps = AnomalyMapGenerator(sigma, percentile_scale=scaled)(torch.full((1, 3, height, width), value))
    expected = torch.full((1, 1, height, width), 0.0 if scaled else 3 * abs(value))
    torch.testing.assert_close(maps, expected, rtol=1e-4, atol=0)


@MANY
@given(
    st.lists(st.floats(0, 1e6, width=32), min_size=2, max_size=6, unique=True),
    st.floats(0, 1e4, width=32),
    st.floats(0, 1e4, width=32),
    st.floats(0, 1e4, width=32),
)
def test_normalisation_is_finite_and_never_turns_an_order_round(
    scores: list[float], least: float, largest: float, threshold: float
) -> None:
    raw = torch.tensor(sorted(scores))
    limits = (torch.tensor(number) for number in (min(least, largest), max(least, largest), threshold))
    normalised = UnclampedPostProcessor._normalize(raw, *limits)
    assert normalised.isfinite().all()
    assert (normalised.diff() >= 0).all()
    assert ((normalised >= 0) & (normalised <= 1)).all()
