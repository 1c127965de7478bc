"""The dual variant's torch model, on small pictures and random sources."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from kd_multiresolution.dual.torch_model import FAMILIES, ChannelError, DualModel, top_mean
from kd_multiresolution.dual.cloners import SMALLEST_DEVIATION, LevelConv, Standardization
from kd_multiresolution.dual.calibration import (
    FEWEST_TO_JUDGE_BY,
    PAINTED,
    ChannelMoments,
    DualTraining,
    ImageScore,
    _differ_as_a_whole,
    _weigh_families,
    calibrate,
    dual_losses,
    gains,
)
from kd_multiresolution.dual.painted_defects import out_of_focus, painted

SIZE = (64, 96)


def pictures(count: int, size: tuple[int, int] = SIZE, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def alone(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over the only process."""
    return tensor


def calibrated(model: DualModel, images: torch.Tensor, image_score: ImageScore = "auto") -> DualModel:
    features = model.source(model.checked_images(images))
    moments = ChannelMoments()
    moments.add(features)
    moments.standardize(model, alone)
    defective = model.source(painted(model.checked_images(images), torch.Generator().manual_seed(0)))
    blurred = model.source(out_of_focus(model.checked_images(images)))
    calibrate(
        model, features, blurred=blurred, defective=defective, image_size=SIZE, image_score=image_score, reduce=alone
    )
    return model.eval()


@pytest.fixture(scope="module")
def model() -> DualModel:
    return calibrated(DualModel("light_vgg"), pictures(6))


@pytest.fixture(params=[False, True], ids=["by its defects", "as a whole"])
def judging(request: pytest.FixtureRequest, model: DualModel) -> Iterator[bool]:
    """The model judges images in one of its two ways."""
    before = model.judged_as_whole.clone()
    model.judged_as_whole.fill_(request.param)
    yield request.param
    model.judged_as_whole.copy_(before)


def mean_of_neighbours(level: torch.Tensor) -> torch.Tensor:
    outcome = torch.empty_like(level)
    for row in range(level.shape[2]):
        for column in range(level.shape[3]):
            around = level[..., max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
            outcome[..., row, column] = around.mean((2, 3))
    return outcome


def test_scores_and_maps_do_not_depend_on_the_batch(model: DualModel, judging: bool) -> None:
    images = pictures(3, seed=1)
    together = model(images)
    assert together.anomaly_map.shape == (3, 1, *SIZE)
    assert (together.anomaly_map >= 0).all()
    features = model.source(model.checked_images(images))
    local, overall = model.predictions(features)
    expected = model.of_defects(model.families(features, local, overall))
    if judging:
        source, near = (mean_of_neighbours(level[-1]) for level in (features, local))
        expected = (1 - F.cosine_similarity(source, near)).mean((1, 2))
    torch.testing.assert_close(together.pred_score, expected)
    for image, score, anomaly_map in zip(images, together.pred_score, together.anomaly_map, strict=True):
        single = model(image[None])
        torch.testing.assert_close(single.pred_score[0], score, rtol=1e-4, atol=0)
        torch.testing.assert_close(single.anomaly_map[0], anomaly_map, rtol=1e-4, atol=1e-5)


def test_what_differs_as_a_whole_is_judged_as_a_whole() -> None:
    """Pictures of one thing are judged by their defects, but not noise, in which a paste of noise is lost."""
    noise = pictures(FEWEST_TO_JUDGE_BY, seed=3)
    assert calibrated(DualModel("light_vgg"), noise).judged_as_whole
    assert not calibrated(DualModel("light_vgg"), noise[:1] + 0.02 * noise).judged_as_whole
    assert not calibrated(DualModel("light_vgg"), noise[1:]).judged_as_whole, "too few to tell"


@pytest.mark.parametrize("image_score", ["defects", "whole"])
@pytest.mark.parametrize(("count", "seed"), [(6, 0), (FEWEST_TO_JUDGE_BY, 3)], ids=["by defects", "as a whole"])
def test_the_image_score_can_be_chosen_whatever_the_images_say(count: int, seed: int, image_score: ImageScore) -> None:
    images = pictures(count, seed=seed)
    found = calibrated(DualModel("light_vgg"), images).judged_as_whole
    assert found == (seed == 3)
    model = calibrated(DualModel("light_vgg"), images, image_score)
    assert model.judged_as_whole == (image_score == "whole")
    features = model.source(model.checked_images(images))
    local, overall = model.predictions(features)
    of_defects = model.of_defects(model.families(features, local, overall))
    expected = {"defects": of_defects, "whole": model.as_a_whole(features, local)}[image_score]
    torch.testing.assert_close(model(images).pred_score, expected)


def test_the_log_says_how_images_are_judged_and_why(caplog: pytest.LogCaptureFixture) -> None:
    noise = pictures(FEWEST_TO_JUDGE_BY, seed=3)
    with caplog.at_level("INFO"):
        for images in (noise, noise[:1] + 0.02 * noise, noise[1:]):
            calibrated(DualModel("light_vgg"), images)
    whole, defects, few = caplog.messages[-3:]
    raises = r"a painted defect raises the mean of a map by \d\.\d\d deviations"
    assert re.fullmatch(f"Images are judged as a whole: {raises}.", whole)
    assert re.fullmatch(f"Images are judged by their defects: {raises}.", defects)
    assert few == "Images are judged by their defects: 7 held-out images are too few to tell."


def test_training_looks_at_its_held_out_images_out_of_focus_and_with_defects() -> None:
    """A process that holds none of them has nothing to look at, and takes the sums of the others."""
    model, images = DualModel("light_vgg"), pictures(8)
    paths = [f"{i}.png" for i in range(len(images))]
    features = model.source(images)
    training = DualTraining(model, seed=0)
    training.start(paths, [(paths, images, features)], alone, resumed=False)
    held_out = [i for i, path in enumerate(paths) if path in training.held_out]
    assert len(held_out) == 4
    for units, level in zip(model.levels_units, features, strict=True):
        fitted = level[[i for i in range(len(paths)) if i not in held_out]]
        torch.testing.assert_close(units.mean, fitted.mean((0, 2, 3)), msg="held-out images have no part in it")
    generator = torch.Generator().manual_seed(0)
    copies = [painted(images[held_out], generator) for _ in range(PAINTED // len(held_out))]
    assert training.calibrate(4, alone) is not None
    assert training.calibrate(4, alone) is None, "nothing has changed since"
    weight = model.family_weight.clone()
    calibrate(
        model, [level[held_out] for level in features], blurred=model.source(out_of_focus(images[held_out])),
        defective=model.source(torch.cat(copies)), image_size=SIZE, image_score="auto", reduce=alone,
    )  # fmt: skip
    torch.testing.assert_close(model.family_weight, weight, rtol=1e-4, atol=1e-4)
    calibrate(
        model, [level[held_out] for level in features], blurred=[level[held_out] for level in features],
        defective=model.source(torch.cat(copies)), image_size=SIZE, image_score="auto", reduce=alone,
    )  # fmt: skip
    assert not model.family_weight.allclose(weight, rtol=1e-2), "the blur counts"
    rest = [i for i in range(len(paths)) if i not in held_out]
    batch = ([paths[i] for i in rest], images[rest], [level[rest] for level in features])
    training.start(paths, [batch], alone, resumed=False)
    scores, _ = training.calibrate(5, lambda tensor: tensor + 2)
    assert scores.count == 2


def test_no_gradient_is_kept_in_evaluation(model: DualModel) -> None:
    output = model(pictures(1).requires_grad_())
    assert not output.pred_score.requires_grad
    assert not output.anomaly_map.requires_grad


def test_grey_pictures_are_three_equal_channels(model: DualModel) -> None:
    grey = pictures(2)[:, :1]
    torch.testing.assert_close(model(grey).pred_score, model(grey.expand(-1, 3, -1, -1)).pred_score)


def test_map_is_zero_where_source_and_cloners_agree(model: DualModel) -> None:
    features = model.source(model.checked_images(pictures(1)))
    families = model.families(features, features[1:], features[1:])
    torch.testing.assert_close(families, torch.zeros_like(families), atol=1e-5, rtol=0)
    assert model.fused(families).abs().max() < 1e-4


@pytest.mark.parametrize(("points", "ratio"), [(("pool2", "pool3", "pool4"), 2), (("pool1", "pool3", "pool5"), 4)])
def test_levels_are_read_position_by_position_and_all_but_the_last_at_two_coarser_scales(
    points: tuple[str, ...], ratio: int
) -> None:
    """Averaged to the next level's positions, and over 3 x 3 of those."""
    model = calibrated(DualModel("light_vgg", critical_points=points), pictures(6))
    true = (features := model.source(model.checked_images(pictures(2))))[1:]
    near, far = ([level + torch.rand_like(level) for level in true] for _ in range(2))
    finer = [true[0], near[0], far[0]]
    coarse = [level.unfold(2, ratio, ratio).unfold(3, ratio, ratio).mean((-2, -1)) for level in finer]
    coarser = [mean_of_neighbours(level) for level in coarse]
    assert coarse[0].shape[2:] == true[1].shape[2:]

    def read(level: list[torch.Tensor], index: int) -> list[torch.Tensor]:
        source, local, overall = level
        maps = [1 - F.cosine_similarity(source, local)[:, None], model.disagreement[index](local - overall)]
        maps = [*(value(source - local) for value in model.value[index : index + 1]), *maps]
        return [F.interpolate(level, size=features[0].shape[-2:], mode="bilinear") for level in maps]

    expected = [*read(finer, 0), *read([true[1], near[1], far[1]], 1), *read(coarse, 0), *read(coarser, 0)]
    families = model.families(features, near, far)
    assert model.maps == [*FAMILIES, *FAMILIES[1:], *FAMILIES, *FAMILIES]
    torch.testing.assert_close(families, torch.cat(expected, 1), rtol=1e-4, atol=1e-5)
    model.family_weight.fill_(1)
    fine = model.fused(families[:, :5])
    torch.testing.assert_close(model.of_defects(families), top_mean(fine)[:, 0])
    assert not model.fused(families).allclose(fine), "the map has the coarser scales as well"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_takes_nothing_from_maps_and_scores(model: DualModel, dtype: torch.dtype) -> None:
    """Errors far beyond what half precision can square, and cosines that it takes for one."""
    features = [400 * level for level in model.source(model.checked_images(pictures(2)))]
    near, far = ([1.001 * level + 1 for level in features[1:]] for _ in range(2))
    far = [level + torch.rand_like(level) for level in far]
    expected = model.families(features, near, far), model.as_a_whole(features, near)
    with torch.autocast("cpu", dtype):
        found = model.families(features, near, far), model.as_a_whole(features, near)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("changed", ["local", "global"])
def test_families_tell_who_is_wrong(model: DualModel, changed: str) -> None:
    """Value and direction compare source and local cloner, disagreement the two cloners."""
    features = model.source(model.checked_images(pictures(1)))
    true = features[1:]
    wrong = [level + torch.rand_like(level) for level in true]
    families = model.families(features, wrong if changed == "local" else true, wrong if changed == "global" else true)
    for name, highest in zip(model.maps, families.amax((0, 2, 3)), strict=True):
        assert (highest > 1e-3) == (name == "disagreement" or changed == "local")


def test_two_critical_points_leave_direction_and_disagreement() -> None:
    model = DualModel("light_vgg", critical_points=["pool2", "pool3"]).eval()
    assert model.maps == ["direction", "disagreement"]
    calibrated(model, pictures(6))
    output = model(pictures(2))
    torch.testing.assert_close(output.pred_score, top_mean(output.anomaly_map[..., 1::4, 1::4])[:, 0], rtol=0.2, atol=0)


def test_maps_count_by_the_cube_of_what_a_defect_raises_them() -> None:
    """Three maps, of other scales, one raised by blur; defects raise them by two, one and minus one deviation."""
    model = DualModel("light_vgg")
    model.family_weight = torch.ones(3)
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(20, 3, generator=generator) * torch.tensor([1.0, 10.0, 0.1])
    blurred = normal + torch.tensor([0.0, 40.0, 0.0])
    deviation = torch.cat([normal, blurred]).std(0)
    assert deviation[1] > 2 * normal.std(0)[1]
    raised = torch.tensor([2.0, 1.0, -1.0]) * deviation
    _weigh_families(model, normal, blurred, torch.cat([normal + 0.5 * raised, normal + 1.5 * raised]), alone)
    torch.testing.assert_close(model.family_weight, torch.tensor([8 / 9, 1 / 9, 0.0]) / deviation)
    _weigh_families(model, normal, blurred, torch.cat([normal + 100 * raised, normal - 0.2 * raised]), alone)
    gains = torch.tensor([5 - 0.4, 5 - 0.2, -5 + 0.2])
    share = gains.clamp_min(0).pow(3)
    torch.testing.assert_close(model.family_weight, share / share.sum() / deviation)


def test_maps_that_no_defect_raises_count_alike() -> None:
    model = DualModel("light_vgg")
    model.family_weight = torch.ones(3)
    normal = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    _weigh_families(model, normal, normal, normal - 1, alone)
    torch.testing.assert_close(model.family_weight * torch.cat([normal, normal]).std(0), torch.full((3,), 1 / 3))


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

    found, unit = gains(normal, normal + two, normal, reduce)
    torch.testing.assert_close(found, torch.tensor([1.0, -2.5, 0.0], dtype=torch.float64))
    alone_found, _ = gains(normal, normal + two, normal, alone)
    torch.testing.assert_close(alone_found, torch.tensor([2.0, -5.0, 0.0], dtype=torch.float64))
    assert (unit > 0).all()


@pytest.mark.parametrize(("raised", "as_whole"), [(0.5, True), (0.7, False)])
def test_one_map_whose_mean_a_defect_raises_is_enough_to_judge_by_defects(raised: float, as_whole: bool) -> None:
    normal = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    deviation = torch.cat([normal, normal]).double().std(0)

    def reduce(tensor: torch.Tensor) -> torch.Tensor:
        """Sum of two processes with the same images."""
        return 2 * tensor

    defective = normal.double()
    defective[:, 3] += raised * deviation[3]
    assert _differ_as_a_whole(normal, defective, reduce) == as_whole
    assert not _differ_as_a_whole(normal, defective, alone), "four images are too few to tell"


def test_maps_are_weighed_by_their_blurred_tops(model: DualModel) -> None:
    images = model.checked_images(pictures(6))
    kinds = [images, out_of_focus(images), painted(images, torch.Generator().manual_seed(0))]
    families = [model.families(features, *model.predictions(features)) for features in map(model.source, kinds)]
    normal, blurred, defective = (top_mean(model.blurred(maps)) for maps in families)
    gain, deviation = gains(normal, defective, torch.cat([normal, blurred]), alone)
    share = gain.clamp_min(0) ** 3
    torch.testing.assert_close(model.family_weight.double(), share / share.sum() / deviation, rtol=1e-3, atol=1e-5)


def test_images_are_judged_by_the_means_of_position_wise_maps(caplog: pytest.LogCaptureFixture) -> None:
    images = pictures(FEWEST_TO_JUDGE_BY, seed=3)
    model = DualModel("light_vgg")
    with caplog.at_level("INFO"):
        calibrated(model, images)
    kinds = [images, painted(images, torch.Generator().manual_seed(0))]
    families = [model.families(features, *model.predictions(features)) for features in map(model.source, kinds)]
    normal, defective = (maps[:, :5].double().mean((2, 3)) for maps in families)
    expected = float(gains(normal, defective, normal, alone)[0].max())
    assert f"the mean of a map by {expected:.2f} deviations" in caplog.messages[-1]


def test_a_process_without_held_out_images_takes_the_others_statistics() -> None:
    model = DualModel("light_vgg")
    nothing = model.source(model.checked_images(pictures(0)))
    scores, peaks = calibrate(
        model, nothing, blurred=nothing, defective=nothing, image_size=SIZE, image_score="auto",
        reduce=lambda tensor: tensor + 2,
    )  # fmt: skip
    assert scores.count == peaks.count == 2
    assert model.family_weight.isfinite().all()
    assert all(error.root_mean_square.allclose(torch.ones(())) for error in (*model.value, *model.disagreement))


def test_score_is_the_mean_of_the_highest_hundredth() -> None:
    maps = torch.arange(1000.0).reshape(1, 1, 20, 50).repeat(2, 1, 1, 1)
    torch.testing.assert_close(top_mean(maps), torch.full((2, 1), 994.5))
    torch.testing.assert_close(top_mean(maps[..., :1, :1]), torch.zeros(2, 1))


@pytest.mark.parametrize(("points", "stride"), [(("pool2", "pool3"), 4), (("pool3", "pool4"), 8)])
def test_blur_is_as_wide_as_told_in_pixels_of_the_image(points: tuple[str, ...], stride: int) -> None:
    """The point that blurs to a Gaussian of sigma 8 pixels lies on the grid of the first level."""
    model = DualModel("light_vgg", critical_points=points, sigma=8.0)
    point = torch.zeros(1, 1, 64, 64)
    point[..., 32, 32] = 1
    spread = model.blurred(point)[0, 0].sum(0)
    positions = stride * (torch.arange(64.0) - 32)
    assert (spread * positions.square()).sum().sqrt().item() == pytest.approx(8, rel=0.02)


def test_channel_error_is_one_on_normal_images() -> None:
    error = ChannelError(3)
    difference = torch.randn(4, 3, 8, 8) * torch.tensor([0.1, 1.0, 10.0])[:, None, None]
    error.set(difference.square().mean((0, 2, 3)))
    torch.testing.assert_close(error(difference).mean(), torch.tensor(1.0))
    dead = ChannelError(2)
    dead.set(torch.tensor([0.0, 1.0]))
    assert dead(torch.ones(1, 2, 1, 1)) < 1.001e4, "a dead channel is not divided by zero"


def test_each_map_of_normal_images_is_one_on_average_and_compares_who_it_says() -> None:
    model, images = DualModel("light_vgg"), pictures(6)
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


def test_global_cloner_knows_of_an_image_what_its_code_says(model: DualModel) -> None:
    codes = []
    handle = model.global_cloner.to_code.register_forward_hook(
        lambda module, given, code: codes.append(code) or torch.ones_like(code)
    )
    features = model.source(pictures(2))
    predicted = model.predictions(features)[1]
    handle.remove()
    assert codes[0].flatten(1).shape == (2, 64)
    assert not codes[0][0].allclose(codes[0][1]), "two pictures, two codes"
    for level in predicted:
        torch.testing.assert_close(level[0], level[1])


def test_channels_count_alike_in_half_precision() -> None:
    """Errors of a ten-thousandth, whose squares float16 does not have; features come in float32 all the same."""
    error = ChannelError(2).half()
    difference = torch.tensor([1e-4, 1e-3])[:, None, None].expand(1, 2, 4, 4)
    error.set(difference.square().mean((0, 2, 3)))
    torch.testing.assert_close(error(difference.half().float()), torch.ones(1, 1, 4, 4), rtol=2e-3, atol=0)


def test_folded_standardisation_equals_the_plain_one() -> None:
    features = torch.randn(2, 5, 6, 7) * 3 + 4
    before, after = Standardization(5), Standardization(4)
    before.set(features.mean((0, 2, 3)), features.square().mean((0, 2, 3)))
    after.set(torch.arange(4.0), torch.arange(4.0).square() + torch.tensor([1.0, 4.0, 9.0, 16.0]))
    torch.testing.assert_close(after.deviation, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    convolution = LevelConv(5, 4, 1)

    def column(numbers: torch.Tensor) -> torch.Tensor:
        return numbers[:, None, None]

    standardized = (features - column(before.mean)) / column(before.deviation)
    expected = nn.functional.conv2d(standardized, convolution.weight, convolution.bias)
    torch.testing.assert_close(convolution.from_level(features, before), expected, rtol=1e-4, atol=1e-5)
    expected = column(after.mean) + column(after.deviation) * nn.functional.conv2d(
        features, convolution.weight, convolution.bias
    )
    torch.testing.assert_close(convolution.to_level(features, after), expected, rtol=1e-4, atol=1e-4)


def test_moments_are_those_of_all_images_at_once() -> None:
    model = DualModel("light_vgg")
    features = [model.source(model.checked_images(pictures(count, seed=count))) for count in (1, 4)]
    moments = ChannelMoments()
    for part in features:
        moments.add(part)
    moments.standardize(model, alone)
    for units, level in zip(model.levels_units, zip(*features, strict=True), strict=True):
        values = torch.cat(level).transpose(0, 1).flatten(1)
        torch.testing.assert_close(units.mean, values.mean(1), rtol=1e-4, atol=1e-5)
        alive = values.std(1) > 0.1 * values.std(1).mean()  # the others are held above a least deviation
        assert alive.sum() > len(alive) / 2
        torch.testing.assert_close(units.deviation[alive], values.std(1, unbiased=False)[alive], rtol=1e-3, atol=0)


@pytest.mark.parametrize("scale", [1, 1000])
def test_loss_is_in_standardised_units(scale: float) -> None:
    """A cloner that predicts the mean of every channel has an error of one per level, whatever the source's scale."""
    model = DualModel("resnet18", pretrained=False)
    generator = torch.Generator().manual_seed(0)
    features = [
        scale * (2 + torch.randn(level.shape, generator=generator))
        for level in model.source(model.checked_images(pictures(3)))
    ]
    moments = ChannelMoments()
    moments.add(features)
    moments.standardize(model, alone)
    for cloner in (model.local_cloner, model.global_cloner):
        for head in cloner.heads:
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
    losses = dual_losses(model, features)
    assert losses["local"].item() == pytest.approx(2, rel=0.03), "one image of three"
    assert losses["global"].item() == pytest.approx(2, rel=1e-3)


@pytest.mark.parametrize(
    ("source", "points"),
    [
        ("resnet18", ("layer1", "layer2", "layer3")),
        ("wide_resnet50_2", ("layer1", "layer2", "layer3")),
        ("efficientnet_b0", ("blocks.1", "blocks.2", "blocks.4")),
        ("convnext_tiny", ("stages.0", "stages.1", "stages.2")),
        ("vgg16", ("pool2", "pool3", "pool4")),
    ],
)
def test_backbones_by_name_learn(source: str, points: tuple[str, ...]) -> None:
    model = DualModel(source, pretrained=False)
    assert model.source.critical_points == points
    images = pictures(2, (64, 64))
    calibrated(model, images)
    features = model.source(model.checked_images(images))
    optimizer = torch.optim.Adam([*model.local_cloner.parameters(), *model.global_cloner.parameters()], 1e-3)
    losses = []
    for _ in range(5):
        loss = torch.stack([*dual_losses(model, features).values()]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    output = model(images)
    assert output.anomaly_map.shape == (2, 1, 64, 64)
    assert output.anomaly_map.isfinite().all()


@pytest.mark.parametrize("size", [(128, 128), (128, 512), (272, 176), (32, 32)])
def test_any_multiple_of_the_stride(model: DualModel, size: tuple[int, int]) -> None:
    output = model(pictures(1, size))
    assert output.anomaly_map.shape == (1, 1, *size)
    assert output.pred_score.isfinite().all()


def test_training_mode_returns_activations(model: DualModel) -> None:
    source, local, overall = model.train()(pictures(2))
    model.eval()
    assert not model.source.training
    assert [level.shape for level in source] == [level.shape for level in local] == [level.shape for level in overall]
    assert not any(level.requires_grad for level in source)
    assert all(level.requires_grad for level in (*local, *overall))


def test_same_seed_same_weights_and_the_global_generator_is_left_alone() -> None:
    state = torch.random.get_rng_state()
    first, second, other = (DualModel("light_vgg", seed=seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), state)
    name = "global_cloner.to_code.weight"
    assert torch.equal(first[name], second[name])
    assert not torch.equal(first[name], other[name])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"critical_points": ["pool3"]}, r"critical_points=\['pool3'\].*expected two"),
        ({"critical_points": ["pool9", "pool3"]}, "pool9"),
        ({"source": "no_such_model"}, "source='no_such_model'"),
        ({"source": "vit_tiny_patch16_224", "pretrained": False}, "source='vit_tiny_patch16_224'.*critical_points"),
        ({"sigma": -1.0}, "sigma=-1.0"),
    ],
)
def test_errors_name_the_argument(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DualModel(**{"source": "light_vgg", **arguments})


def test_picture_of_another_size_is_refused(model: DualModel) -> None:
    with pytest.raises(ValueError, match=r"image_size=\(64, 60\).*multiples of 16"):
        model(pictures(1, (64, 60)))
