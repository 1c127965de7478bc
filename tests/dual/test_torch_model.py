"""The dual torch model, on small pictures and random sources."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from kd_multiresolution.dual.loss import cloner_losses
from kd_multiresolution.dual.maps import FAMILIES, top_mean
from kd_multiresolution.dual.torch_model import KdMultiresolutionDualModel
from tests.dual.calibrated import SIZE, calibrated, mean_of_neighbours, pictures


@pytest.fixture(params=[False, True], ids=["by its defects", "as a whole"])
def judging(request: pytest.FixtureRequest, model: KdMultiresolutionDualModel) -> Iterator[bool]:
    """The model judges images in one of its two ways."""
    before = model.judged_as_whole.clone()
    model.judged_as_whole.fill_(request.param)
    yield request.param
    model.judged_as_whole.copy_(before)


def test_scores_and_maps_do_not_depend_on_the_batch(model: KdMultiresolutionDualModel, judging: bool) -> None:
    images = pictures(3, seed=1)
    together = model(images)
    assert together.anomaly_map.shape == (3, 1, *SIZE)
    assert (together.anomaly_map >= 0).all()
    features = model.source(model.checked_images(images))
    local, overall = model.predictions(features)
    expected = model.of_defects(model.families(features, local, overall), model.positions(features))
    if judging:
        source, near = (mean_of_neighbours(level[-1]) for level in (features, local))
        expected = (1 - F.cosine_similarity(source, near)).mean((1, 2))
    torch.testing.assert_close(together.pred_score, expected)
    for image, score, anomaly_map in zip(images, together.pred_score, together.anomaly_map, strict=True):
        single = model(image[None])
        torch.testing.assert_close(single.pred_score[0], score, rtol=1e-4, atol=0)
        torch.testing.assert_close(single.anomaly_map[0], anomaly_map, rtol=1e-4, atol=1e-5)


def test_no_gradient_is_kept_in_evaluation(model: KdMultiresolutionDualModel) -> None:
    output = model(pictures(1).requires_grad_())
    assert not output.pred_score.requires_grad
    assert not output.anomaly_map.requires_grad


def test_grey_pictures_are_three_equal_channels(model: KdMultiresolutionDualModel) -> None:
    grey = pictures(2)[:, :1]
    torch.testing.assert_close(model(grey).pred_score, model(grey.expand(-1, 3, -1, -1)).pred_score)


def test_map_is_zero_where_source_and_cloners_agree(model: KdMultiresolutionDualModel) -> None:
    features = model.source(model.checked_images(pictures(1)))
    families = model.families(features, features[1:], features[1:])
    torch.testing.assert_close(families, torch.zeros_like(families), atol=1e-5, rtol=0)
    assert model.fused(families).abs().max() < 1e-4


@pytest.mark.parametrize(("points", "ratio"), [(("pool2", "pool3", "pool4"), 2), (("pool1", "pool3", "pool5"), 4)])
def test_levels_are_read_position_by_position_and_all_but_the_last_at_two_coarser_scales(
    points: tuple[str, ...], ratio: int
) -> None:
    """Averaged to the next level's positions, and over 3 x 3 of those."""
    model = calibrated(KdMultiresolutionDualModel("small_vgg", critical_points=points), pictures(6))
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
    model.family_weight.copy_(torch.rand(2, 11, generator=torch.Generator().manual_seed(0)))
    of_map, of_score = (model.blurred(families) * weight[:, None, None] for weight in model.family_weight)
    torch.testing.assert_close(model.fused(families), of_map.sum(1, keepdim=True))
    torch.testing.assert_close(
        model.tops(families, model.positions(features))[0], top_mean(of_score.sum(1, keepdim=True))[:, 0]
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_takes_nothing_from_maps_and_scores(model: KdMultiresolutionDualModel, dtype: torch.dtype) -> None:
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
def test_families_tell_who_is_wrong(model: KdMultiresolutionDualModel, changed: str) -> None:
    """Value and direction compare source and local cloner, disagreement the two cloners."""
    features = model.source(model.checked_images(pictures(1)))
    true = features[1:]
    wrong = [level + torch.rand_like(level) for level in true]
    families = model.families(features, wrong if changed == "local" else true, wrong if changed == "global" else true)
    for name, highest in zip(model.maps, families.amax((0, 2, 3)), strict=True):
        assert (highest > 1e-3) == (name == "disagreement" or changed == "local")


def test_two_critical_points_leave_direction_and_disagreement() -> None:
    model = KdMultiresolutionDualModel("small_vgg", critical_points=["pool2", "pool3"]).eval()
    assert model.maps == ["direction", "disagreement"]
    calibrated(model, pictures(6))
    model.family_weight[1] = model.family_weight[0]
    model.position_weight.zero_()
    output = model(pictures(2))
    torch.testing.assert_close(output.pred_score, top_mean(output.anomaly_map[..., 1::4, 1::4])[:, 0], rtol=0.2, atol=0)


@pytest.mark.parametrize(("points", "stride"), [(("pool2", "pool3"), 4), (("pool3", "pool4"), 8)])
def test_blur_is_as_wide_as_told_in_pixels_of_the_image(points: tuple[str, ...], stride: int) -> None:
    """The point that blurs to a Gaussian of sigma 8 pixels lies on the grid of the first level."""
    model = KdMultiresolutionDualModel("small_vgg", critical_points=points, sigma=8.0)
    point = torch.zeros(1, 1, 64, 64)
    point[..., 32, 32] = 1
    spread = model.blurred(point)[0, 0].sum(0)
    positions = stride * (torch.arange(64.0) - 32)
    assert (spread * positions.square()).sum().sqrt().item() == pytest.approx(8, rel=0.02)


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
    model = KdMultiresolutionDualModel(source, pretrained=False)
    assert model.source.critical_points == points
    images = pictures(2, (64, 64))
    calibrated(model, images)
    features = model.source(model.checked_images(images))
    optimizer = torch.optim.Adam([*model.local_cloner.parameters(), *model.global_cloner.parameters()], 1e-3)
    losses = []
    for _ in range(5):
        loss = torch.stack([*cloner_losses(model, features).values()]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    output = model(images)
    assert output.anomaly_map.shape == (2, 1, 64, 64)
    assert output.anomaly_map.isfinite().all()


@pytest.mark.parametrize("size", [(128, 128), (128, 512), (272, 176), (32, 32)])
def test_any_multiple_of_the_stride(model: KdMultiresolutionDualModel, size: tuple[int, int]) -> None:
    output = model(pictures(1, size))
    assert output.anomaly_map.shape == (1, 1, *size)
    assert output.pred_score.isfinite().all()


def test_training_mode_returns_activations(model: KdMultiresolutionDualModel) -> None:
    source, local, overall = model.train()(pictures(2))
    model.eval()
    assert not model.source.training
    assert [level.shape for level in source] == [level.shape for level in local] == [level.shape for level in overall]
    assert not any(level.requires_grad for level in source)
    assert all(level.requires_grad for level in (*local, *overall))


def test_same_seed_same_weights_and_the_global_generator_is_left_alone() -> None:
    state = torch.random.get_rng_state()
    first, second, other = (KdMultiresolutionDualModel("small_vgg", seed=seed).state_dict() for seed in (3, 3, 4))
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
        KdMultiresolutionDualModel(**{"source": "small_vgg", **arguments})


def test_picture_of_another_size_is_refused(model: KdMultiresolutionDualModel) -> None:
    with pytest.raises(ValueError, match=r"image_size=\(64, 60\).*multiples of 16"):
        model(pictures(1, (64, 60)))
