"""Thresholds keep what they promise, whatever scores look like."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from kd_multiresolution.line.choice import Costs, allowed_by_rate, cheapest, expected_rate, with_above


@pytest.mark.parametrize(
    "draw", [stats.norm(5, 1), stats.lognorm(1.5), stats.uniform(0, 1)], ids=["normal", "tail", "flat"]
)
@pytest.mark.parametrize(("rate", "count"), [(0.01, 100), (0.05, 60), (0.1, 9)])
def test_a_rate_of_false_alarms_is_kept(draw: stats.rv_continuous, rate: float, count: int) -> None:
    generator = np.random.default_rng(0)
    allowed = allowed_by_rate(rate, count)
    rates = [draw.sf(with_above(draw.rvs(count, random_state=generator), allowed)) for _ in range(4000)]
    error = 4 * np.std(rates) / len(rates) ** 0.5
    expected, bound = expected_rate(allowed, count)
    assert expected <= rate
    assert 0.5 * expected < np.mean(rates) < expected + error, "no higher, and not for nothing lower"
    assert np.mean(np.array(rates) < bound) >= 0.94


@pytest.mark.parametrize(("rate", "needed"), [(0.001, 999), (0.01, 99), (0.03, 33)])
def test_a_rate_that_so_few_images_cannot_show_is_refused(rate: float, needed: int) -> None:
    with pytest.raises(ValueError, match=rf"30 good images cannot show .* {needed} good images or more"):
        allowed_by_rate(rate, 30)
    assert allowed_by_rate(rate, needed) == 0
    with pytest.raises(ValueError, match="cannot show"):
        allowed_by_rate(rate, needed - 1)


def test_the_rate_that_is_named_instead_can_be_had() -> None:
    with pytest.raises(ValueError, match="cannot show") as refused:
        allowed_by_rate(0.001, 30)
    named = float(str(refused.value).split("a rate of ")[1].split(" ")[0])
    assert allowed_by_rate(named, 30) == 0


@pytest.mark.parametrize("rate", [0, -0.1, 0.5, 1.0, float("nan"), float("inf")])
def test_a_rate_is_a_fraction(rate: float) -> None:
    with pytest.raises(ValueError, match="false_alarm_rate"):
        allowed_by_rate(rate, 1000)


@pytest.mark.parametrize("scores", [[1, 2, 3, 4, 5], [2, 2, 2, 2, 2], [0, 0, 0, 1, 1], [-3, -2, -1, -1, -1]])
def test_no_more_than_allowed_are_above(scores: list[float]) -> None:
    for allowed in range(len(scores)):
        threshold = with_above(scores, allowed)
        assert sum(score > threshold for score in scores) <= allowed
        assert threshold not in scores, "last digits decide nothing"


def test_costs_decide() -> None:
    good, defective = np.array([1.0, 2.0, 3.0, 6.0]), np.array([5.0, 7.0, 8.0])
    assert cheapest(Costs(100, 1), good, defective) == 4.0
    assert cheapest(Costs(1, 100), good, defective) == 6.5
    # Of a thousand parts one is defective: false alarms weigh more than among these seven.
    assert cheapest(Costs(100, 1, defect_share=0.001), good, defective) == 6.5


@pytest.mark.parametrize("seed", range(5))
def test_no_threshold_costs_less(seed: int) -> None:
    generator = np.random.default_rng(seed)
    good, defective = generator.normal(0, 1, 50), generator.normal(1, 1, 20)
    costs = Costs(*generator.uniform(0.1, 10, 2))

    def paid(threshold: float) -> float:
        return costs.per_image((good > threshold).sum(), (defective <= threshold).sum(), 50, 20)

    best = paid(cheapest(costs, good, defective))
    assert best <= min(paid(threshold) for threshold in np.linspace(-5, 5, 2001)) + 1e-12
