"""What held-out images, as they are, out of focus and with painted defects, make of the model."""

from __future__ import annotations

import re

import pytest
import torch

from kd_multiresolution.dual.calibration import (
    FEWEST_TO_JUDGE_BY,
    LEAST_GAIN,
    ImageScore,
    _differ_as_a_whole,
    _weigh_families,
    calibrate,
    deviation_of_most,
    gains,
    mean_and_deviation,
    shares,
)
from kd_multiresolution.dual.maps import top_mean
from kd_multiresolution.dual.painted_defects import out_of_focus, painted
from kd_multiresolution.dual.torch_model import KdMultiresolutionDualModel
from kd_multiresolution.source.channel_moments import SMALLEST_DEVIATION
from tests.dual.calibrated import SIZE, alone, calibrated, calibration, pictures


def disc() -> torch.Tensor:
    """A thing on a background."""
    down, right = (torch.arange(side) - side / 2 for side in SIZE)
    return 0.5 * (down[:, None].square() + right.square() < (SIZE[0] / 3) ** 2).float()


def test_what_differs_as_a_whole_is_judged_as_a_whole() -> None:
    """Pictures of one thing are judged by their defects, but not noise, in which a paste of noise is lost."""
    noise = pictures(FEWEST_TO_JUDGE_BY, seed=3)
    things = disc() + 0.02 * noise
    assert calibrated(KdMultiresolutionDualModel("efficientnet_lite0"), noise).judged_as_whole
    assert not calibrated(KdMultiresolutionDualModel("efficientnet_lite0"), things).judged_as_whole
    assert not calibrated(KdMultiresolutionDualModel("efficientnet_lite0"), noise[1:]).judged_as_whole, (
        "too few to tell"
    )


@pytest.mark.parametrize("image_score", ["defects", "whole"])
@pytest.mark.parametrize(("count", "seed"), [(6, 0), (FEWEST_TO_JUDGE_BY, 3)], ids=["by defects", "as a whole"])
def test_the_image_score_can_be_chosen_whatever_the_images_say(count: int, seed: int, image_score: ImageScore) -> None:
    images = pictures(count, seed=seed)
    found = calibrated(KdMultiresolutionDualModel("efficientnet_lite0"), images).judged_as_whole
    assert found == (seed == 3)
    model = calibrated(KdMultiresolutionDualModel("efficientnet_lite0"), images, image_score)
    assert model.judged_as_whole == (image_score == "whole")
    features = model.source(model.checked_images(images))
    local, overall = model.predictions(features)
    of_defects = model.of_defects(model.families(features, local, overall), model.positions(features))
    expected = {"defects": of_defects, "whole": model.as_a_whole(features, local)}[image_score]
    torch.testing.assert_close(model(images).pred_score, expected)


def test_it_says_how_images_are_judged_and_why() -> None:
    noise = pictures(FEWEST_TO_JUDGE_BY, seed=3)
    whole, defects, few = (
        calibration(KdMultiresolutionDualModel("efficientnet_lite0"), images).judgement
        for images in (noise, disc() + 0.02 * noise, noise[1:])
    )
    number = r"-?\d\.\d\d"
    raises = rf"a painted defect raises .* disagreement by {number} deviations .*, the mean of a map by {number} .*"
    assert re.fullmatch(f"Images are judged as a whole: {raises}", whole)
    assert re.fullmatch(f"Images are judged by their defects: {raises}", defects)
    assert few == "Images are judged by their defects: 7 held-out images are too few to tell."
    chosen = calibration(KdMultiresolutionDualModel("small_vgg"), noise, "whole").judgement
    assert chosen == "Images are judged as a whole: image_score='whole'."


def test_maps_count_by_the_cube_of_what_a_defect_raises_them() -> None:
    """Three maps, of other scales, one raised by blur; defects raise them by two, one and minus one deviation."""
    model = KdMultiresolutionDualModel("small_vgg")
    model.family_weight = torch.ones(2, 3)
    generator = torch.Generator().manual_seed(0)
    normal = 50 + torch.randn(20, 3, generator=generator) * torch.tensor([1.0, 10.0, 0.1])
    blurred = normal + torch.tensor([0.0, 40.0, 0.0])
    deviation = deviation_of_most(torch.cat([normal, blurred]), alone).float()
    assert deviation[1] > 2 * normal.std(0)[1]
    raised = torch.tensor([2.0, 1.0, -1.0]) * deviation
    _weigh_families(model, normal, blurred, torch.cat([normal + 0.5 * raised, normal + 1.5 * raised]), alone)
    units = torch.stack([normal.mean(0), deviation])
    share = torch.tensor([2.0, 1.0, LEAST_GAIN]) ** 3
    torch.testing.assert_close(model.family_weight, share / share.sum() / units)
    _weigh_families(model, normal, blurred, torch.cat([normal + 100 * raised, normal - 0.2 * raised]), alone)
    share = torch.tensor([5 - 0.4, 5 - 0.2, 2 * LEAST_GAIN]) ** 3  # of both halves
    torch.testing.assert_close(model.family_weight, share / share.sum() / units)


def test_maps_that_no_defect_raises_count_alike() -> None:
    """As those that one raises by no more than chance does, such as a patch of a texture in the same texture."""
    model = KdMultiresolutionDualModel("small_vgg")
    model.family_weight = torch.ones(2, 3)
    normal = 9 + torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    deviation = deviation_of_most(torch.cat([normal, normal]), alone).float()
    raised = torch.tensor([-1.0, 0.0, 0.9 * LEAST_GAIN]) * deviation
    _weigh_families(model, normal, normal, normal + raised, alone)
    units = torch.stack([normal.mean(0), deviation])
    torch.testing.assert_close(model.family_weight * units, torch.full((2, 3), 1 / 3))


def test_gains_are_those_of_all_processes_and_no_defect_counts_more_than_five_deviations() -> None:
    """One process's images are never raised, another's by two deviations; one map is constant."""
    normal = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    normal[:, 2] = 1
    deviation = normal.std(0)
    none, two = torch.zeros(8, 3), torch.tensor([2.0, -9.0, 0.0]) * deviation
    others = [torch.cat([part.sum(0), torch.tensor([8.0])]) for part in (none, torch.tensor([2.0, -5, 0]).expand(8, 3))]
    both = sum(others[1:], others[0])

    def reduce(tensor: torch.Tensor) -> torch.Tensor:
        """Sum of two processes: the moments of equal rows are twice one's, the gains those above."""
        return both.to(tensor) if tensor.shape == both.shape else 2 * tensor

    found = gains(normal, normal + two, deviation, reduce)
    torch.testing.assert_close(found, torch.tensor([1.0, -2.5, 0.0], dtype=torch.float64))
    alone_found = gains(normal, normal + two, deviation, alone)
    torch.testing.assert_close(alone_found, torch.tensor([2.0, -5.0, 0.0], dtype=torch.float64))


def test_a_deviation_is_that_of_most_numbers() -> None:
    numbers = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    numbers[:, 1] = 3 - 10 * numbers[:, 1]
    whole = deviation_of_most(numbers, alone)
    torch.testing.assert_close(whole, numbers.std(0), rtol=0.02, atol=0)
    few = numbers[:26].clone()
    before = deviation_of_most(few, alone)
    few[3] += 500
    torch.testing.assert_close(deviation_of_most(few, alone), before, rtol=0.3, atol=0)
    assert (few.std(0) > 9 * before).all()
    assert not deviation_of_most(torch.ones(5, 2), alone).any()
    # Twice the same numbers have the same deviation but for the degrees of freedom.
    torch.testing.assert_close(deviation_of_most(numbers, lambda sums: 2 * sums), whole, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("of_disagreement", "of_means", "as_whole"), [(0.8, 0.9, True), (0.9, -1, False), (-1, 1.1, False)]
)
def test_one_gain_is_enough_to_judge_by_defects(of_disagreement: float, of_means: float, as_whole: bool) -> None:
    assert _differ_as_a_whole(of_disagreement, of_means, FEWEST_TO_JUDGE_BY)[0] == as_whole
    assert not _differ_as_a_whole(of_disagreement, of_means, FEWEST_TO_JUDGE_BY - 1)[0], "too few to tell"


def test_maps_are_weighed_by_their_blurred_tops(model: KdMultiresolutionDualModel) -> None:
    images = model.checked_images(pictures(6))
    kinds = [images, out_of_focus(images), painted(images, torch.Generator().manual_seed(0))]
    families = [model.families(features, *model.predictions(features)) for features in map(model.source, kinds)]
    normal, blurred, defective = (top_mean(model.blurred(maps)) for maps in families)
    deviation = deviation_of_most(torch.cat([normal, blurred]), alone)
    share = shares(gains(normal, defective, deviation, alone).clamp_min(LEAST_GAIN))
    expected = share / torch.stack([normal.double().mean(0), deviation])
    found = model.family_weight.double()
    found[1] *= expected[1].sum() / found[1].sum()  # as a part of the score, of which the positions are the other
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_images_are_judged_by_the_gains_of_disagreement_and_of_means() -> None:
    """In plain deviations."""
    images = pictures(FEWEST_TO_JUDGE_BY, seed=3)
    model = KdMultiresolutionDualModel("small_vgg")
    judgement = calibration(model, images).judgement
    kinds = [images, out_of_focus(images), painted(images, torch.Generator().manual_seed(0))]
    families = [model.families(features, *model.predictions(features)) for features in map(model.source, kinds)]
    normal, blurred, defective = (top_mean(model.blurred(maps)) for maps in families)
    gain = gains(normal, defective, torch.cat([normal, blurred]).std(0), alone)
    highest = float(gain[[name == "disagreement" for name in model.maps]].max())
    assert f"disagreement by {highest:.2f} deviations" in judgement
    normal, _, defective = (maps[:, :5].double().mean((2, 3)) for maps in families)
    assert f"mean of a map by {float(gains(normal, defective, normal.std(0), alone).max()):.2f} " in judgement


def test_a_process_without_held_out_images_takes_the_others_statistics() -> None:
    model = KdMultiresolutionDualModel("small_vgg")
    nothing = model.source(model.checked_images(pictures(0)))
    scores, peaks, _ = calibrate(
        model, nothing, blurred=nothing, defective=nothing, image_size=SIZE, image_score="auto",
        reduce=lambda tensor: tensor + 2,
    )  # fmt: skip
    assert scores.count == peaks.count == 2
    assert model.family_weight.isfinite().all()
    assert all(error.root_mean_square.allclose(torch.ones(())) for error in (*model.value, *model.disagreement))


def test_each_map_of_normal_images_is_one_on_average_and_compares_who_it_says() -> None:
    model, images = KdMultiresolutionDualModel("small_vgg"), pictures(6)
    calibrated(model, images)
    features = model.source(images)
    local, overall = model.predictions(features)
    for source, near, far, value, disagreement in zip(
        features[1:], local, overall, [*model.value, None], model.disagreement, strict=True
    ):
        for error, difference in ((disagreement, near - far), (value, source - near)):
            if error is not None:
                mean_square = difference.square().mean((0, 2, 3))
                least = SMALLEST_DEVIATION * mean_square.mean().sqrt()  # of a channel that is always zero
                torch.testing.assert_close(error.root_mean_square, mean_square.sqrt().clamp_min(least))


def test_statistics_over_processes_are_those_of_all_rows() -> None:
    rows = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    mean, deviation, count = mean_and_deviation(rows, lambda tensor: tensor)
    assert count == 20
    torch.testing.assert_close(mean, rows.mean(0))
    torch.testing.assert_close(deviation, rows.std(0))


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scene", ["noise", "one scene"])
def test_thresholds_in_half_precision_are_those_of_the_scores_that_are_given(
    scene: str, precision: torch.dtype
) -> None:
    images = pictures(8) if scene == "noise" else disc() + 0.02 * pictures(8)
    model = KdMultiresolutionDualModel("small_vgg").to(precision)
    scores = torch.tensor(calibration(model, images, "defects").scores.scores)
    found = model.eval()(images)
    assert found.anomaly_map.dtype == torch.float32
    torch.testing.assert_close(found.pred_score.float(), scores, rtol=0, atol=0.02 * float(scores.std()))


@pytest.mark.parametrize("precision", [torch.float32, torch.float16])
@pytest.mark.parametrize("flat", [False, True])
def test_what_never_varies_is_not_called_defective(flat: bool, precision: torch.dtype) -> None:
    """Nor is one of it, although the last digit of its score differs with the size of the batch."""
    image = torch.full((1, 3, *SIZE), 0.5) if flat else pictures(1)
    model = KdMultiresolutionDualModel("small_vgg").to(precision)
    found = calibration(model, image.repeat(8, 1, 1, 1), "defects")
    for count in range(1, 9):
        read = model.eval()(image.repeat(count, 1, 1, 1))
        assert (read.pred_score <= found.scores.bound(0.01)).all()
        assert (read.anomaly_map <= found.peaks.bound(0.01)).all()
