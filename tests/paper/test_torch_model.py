from __future__ import annotations

import copy

import pytest
import torch
from anomalib.data import InferenceBatch
from torch import Tensor, nn
from torchvision import tv_tensors

from kd_multiresolution import KdMultiresolutionModel, discrepancy
from kd_multiresolution.paper.anomaly_map import discrepancy_map
from kd_multiresolution.paper.attribution import input_gradient


def model(**arguments: object) -> KdMultiresolutionModel:
    return KdMultiresolutionModel("small_vgg", **arguments).eval()


@pytest.fixture(scope="module")
def default() -> KdMultiresolutionModel:
    return model()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(4, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def test_training_mode_returns_features_and_evaluation_mode_predictions(images: Tensor) -> None:
    network = model()
    source, cloner = network.train()(images)
    assert [f.shape for f in source] == [f.shape for f in cloner]
    assert len(source) == 4
    assert not any(f.requires_grad for f in source)
    assert all(f.requires_grad for f in cloner)
    predictions = network.eval()(images)
    assert isinstance(predictions, InferenceBatch)
    assert predictions.pred_score.shape == (4,)
    assert predictions.anomaly_map.shape == (4, 1, 64, 96)
    assert predictions.pred_label is predictions.pred_mask is None


@pytest.mark.parametrize("path", ["both", "cloner"])
def test_score_and_map_follow_the_definition(images: Tensor, path: str) -> None:
    network = model(attribution_path=path, value_weight=0.3, score_points=["pool3", "pool5"])

    def score(x: Tensor) -> Tensor:
        source = network.source(x if path == "both" else x.detach())
        cloner = network.cloner(x)
        return discrepancy([source[1], source[3]], [cloner[1], cloner[3]], value_weight=0.3)

    scores, gradient = input_gradient(score, images)
    predictions = network(images)
    torch.testing.assert_close(predictions.pred_score, scores)
    torch.testing.assert_close(predictions.anomaly_map, network.anomaly_map_generator(gradient))


def test_the_two_paths_give_the_same_score_and_different_maps(images: Tensor) -> None:
    both, cloner = (model(attribution_path=path)(images) for path in ("both", "cloner"))
    assert torch.equal(both.pred_score, cloner.pred_score)
    assert not torch.allclose(both.anomaly_map, cloner.anomaly_map)


def test_default_points() -> None:
    assert model().score_points == ("pool3", "pool4", "pool5")
    assert model(critical_points=["pool4", "pool5"]).score_points == ("pool4", "pool5")


def test_terms(images: Tensor) -> None:
    total, value, direction = (
        model(terms=terms, value_weight=0.2, anomaly_map=None)(images).pred_score
        for terms in ("total", "value", "direction")
    )
    torch.testing.assert_close(total, direction + 0.2 * value)


def test_an_image_does_not_depend_on_the_others(default: KdMultiresolutionModel, images: Tensor) -> None:
    together = default(images)
    for i, image in enumerate(images):
        alone = default(image[None])
        torch.testing.assert_close(alone.pred_score[0], together.pred_score[i])
        torch.testing.assert_close(alone.anomaly_map[0], together.anomaly_map[i], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("path", ["both", "cloner"])
def test_scoring_leaves_the_model_untouched(images: Tensor, context: type, path: str) -> None:
    network = model(attribution_path=path)
    before = copy.deepcopy(network.state_dict())
    expected = network(images)
    with context():
        predictions = network(tv_tensors.Image(images))
    assert torch.equal(predictions.pred_score, expected.pred_score)
    assert torch.equal(predictions.anomaly_map, expected.anomaly_map)
    assert not predictions.anomaly_map.requires_grad
    assert all(parameter.grad is None for parameter in network.parameters())
    for name, tensor in network.state_dict().items():
        assert tensor == before[name] if isinstance(tensor, dict) else torch.equal(tensor, before[name]), name


def test_scores_alone_and_discrepancy_map_cost_no_gradient(images: Tensor) -> None:
    reference = model()(images)
    tracked = images.clone().requires_grad_()  # what keeps a graph shows in the outputs
    scores, discrepancies = (model(anomaly_map=name)(tracked) for name in (None, "discrepancy"))
    for predictions in (scores, discrepancies):
        torch.testing.assert_close(predictions.pred_score, reference.pred_score, rtol=1e-5, atol=0)
        assert not predictions.pred_score.requires_grad
    assert scores.anomaly_map is None
    assert not discrepancies.anomaly_map.requires_grad


def test_discrepancy_map_follows_the_definition(images: Tensor) -> None:
    network = model(anomaly_map="discrepancy", value_weight=0.3, terms="value", score_points=["pool3", "pool4"])
    source, cloner = network.features(images)
    maps = discrepancy_map(source[1:3], cloner[1:3], (64, 96), value_weight=0.3, terms="value")
    torch.testing.assert_close(network(images).anomaly_map, network.anomaly_map_generator(maps))


def test_grey_images_are_repeated(default: KdMultiresolutionModel) -> None:
    grey = torch.rand(2, 1, 32, 32)
    assert torch.equal(default(grey).pred_score, default(grey.repeat(1, 3, 1, 1)).pred_score)


def test_flat_images_have_finite_scores_and_maps(default: KdMultiresolutionModel) -> None:
    flat = torch.stack([torch.full((3, 32, 32), value) for value in (0.0, 0.5, 1.0)])
    predictions = default(flat)
    for tensor in (predictions.pred_score, predictions.anomaly_map):
        assert torch.isfinite(tensor).all()
        assert (tensor >= 0).all()


def test_the_seed_makes_the_model() -> None:
    first, second, other = (model(pretrained=False, seed=seed).state_dict() for seed in (4, 4, 5))
    weights = [name for name in first if name.endswith(".weight") and first[name].ndim == 4]
    assert all(torch.equal(first[name], second[name]) for name in weights)
    assert not any(torch.equal(first[name], other[name]) for name in weights)


def test_auto_weight_is_in_the_state_and_scoring_without_it_is_refused(images: Tensor) -> None:
    network = model(value_weight="auto")
    with pytest.raises(RuntimeError, match="value_weight='auto' is set at the start of training"):
        network(images)
    trained = model(value_weight=0.125)
    network.load_state_dict(trained.state_dict())
    assert network.value_weight == 0.125
    assert torch.equal(network(images).pred_score, trained(images).pred_score)


def test_source_stays_frozen_in_training_mode() -> None:
    network = KdMultiresolutionModel("resnet18", pretrained=False, critical_points=["layer1"])
    before = copy.deepcopy(network.source.state_dict())
    network.train()
    loss = sum(f.sum() for features in network(torch.rand(4, 3, 32, 32)) for f in features)
    loss.backward()
    assert all(parameter.grad is None for parameter in network.source.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.source.state_dict().items())
    assert any(isinstance(module, nn.BatchNorm2d) for module in network.source.modules()), "the test needs batch norm"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"anomaly_map": "saliency"}, "anomaly_map='saliency': expected one of gradient, .*discrepancy"),
        ({"smooth_grad_samples": 0}, "smooth_grad_samples=0: expected a number of noisy copies"),
        ({"smooth_grad_noise": -0.1}, "smooth_grad_noise=-0.1: expected a fraction"),
        ({"attribution_path": "source"}, "attribution_path='source': expected one of both, cloner"),
        ({"cloner": "large"}, "cloner='large'"),
        ({"terms": "cosine"}, "terms='cosine'"),
        ({"value_weight": 0}, "value_weight=0: expected a number above 0, or 'auto'"),
        ({"value_weight": float("nan")}, "value_weight=nan"),
        ({"value_weight": "automatic"}, "value_weight='automatic'"),
        ({"sigma": -1.0}, "sigma=-1.0"),
        ({"critical_points": ["pool4"], "score_points": ["pool5"]}, r"score_points=\['pool5'\].*pool4"),
        ({"score_points": []}, r"score_points=\[\]"),
    ],
)
def test_errors_name_the_argument(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(**arguments)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.rand(3, 64, 64), r"images: expected float tensors .* not torch.float32 \(3, 64, 64\)"),
        (torch.rand(1, 4, 64, 64), r"\(1, 4, 64, 64\)"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), "torch.uint8"),
        (torch.rand(1, 3, 64, 70), r"image_size=\(64, 70\): .* multiples of 32, .* for example \(64, 64\)"),
        (torch.rand(1, 3, 16, 64), r"image_size=\(16, 64\): .* for example \(32, 64\)"),
    ],
)
def test_images_of_another_form_are_refused(default: KdMultiresolutionModel, bad: Tensor, message: str) -> None:
    for network in (default, copy.deepcopy(default).train()):
        with pytest.raises(ValueError, match=message):
            network(bad)


def test_each_checkpoint_brings_the_value_weight_that_it_was_trained_with(images: Tensor) -> None:
    network = model(value_weight="auto", anomaly_map=None)
    for weight in (0.1, 7.0):
        trained = model(value_weight="auto", anomaly_map=None, seed=1)
        trained.value_weight = weight
        network.load_state_dict(trained.state_dict())
        assert torch.equal(network(images).pred_score, trained(images).pred_score)
    given = model(value_weight=0.3)
    given.load_state_dict(trained.state_dict())
    assert given.value_weight == 0.3


@pytest.mark.parametrize("anomaly_map", ["gradient", "guided_backprop"])
def test_a_compiled_gradient_keeps_its_precision_under_autocast(anomaly_map: str, images: Tensor) -> None:
    network = model(anomaly_map=anomaly_map, attribution_path="cloner")
    expected = network(images)
    torch.compiler.reset()
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.compile(network, backend="eager", fullgraph=True)(images)
    torch.testing.assert_close(found.pred_score, expected.pred_score)
    torch.testing.assert_close(
        found.anomaly_map, expected.anomaly_map, rtol=1e-3, atol=1e-3 * expected.anomaly_map.max()
    )


@pytest.mark.parametrize("anomaly_map", [None, "discrepancy", "gradient", "smooth_grad", "guided_backprop"])
def test_no_image_has_no_score(anomaly_map: str | None) -> None:
    predictions = model(anomaly_map=anomaly_map)(torch.zeros(0, 3, 64, 96))
    assert predictions.pred_score.shape == (0,)
    assert anomaly_map is None or predictions.anomaly_map.shape == (0, 1, 64, 96)
