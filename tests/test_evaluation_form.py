"""What both models compute in evaluation mode: in few operators, in one graph, and the same as step by step."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from anomalib.data import InferenceBatch
from torch import Tensor, nn

from kd_multiresolution import KdMultiresolutionModel
from kd_multiresolution.dual.torch_model import KdMultiresolutionDualModel
from kd_multiresolution.paper.anomaly_map import discrepancy_map
from kd_multiresolution.paper.discrepancy import discrepancy
from kd_multiresolution.paper.evaluation import fast_scores, fast_scores_and_maps
from operators import operators

POINTS = ["layer1", "layer2", "layer3"]
MAPS: dict[str, dict[str, Any]] = {
    "score": {"anomaly_map": None},
    "discrepancy": {"anomaly_map": "discrepancy"},
    "gradient, cloner": {"attribution_path": "cloner"},
    "gradient, both": {"attribution_path": "both"},
    "guided": {"anomaly_map": "guided_backprop"},
}
FORWARD = ["score", "discrepancy", "dual"]
Model = KdMultiresolutionModel | KdMultiresolutionDualModel


def make(name: str, points: list[str] = POINTS, **arguments: Any) -> Model:
    """Return a model with statistics and weights of maps unlike those at first."""
    network: Model
    if name == "dual":
        network = KdMultiresolutionDualModel("resnet18", pretrained=False, critical_points=points, sigma=2.0)
    else:
        settings = {**MAPS[name], **arguments}
        network = KdMultiresolutionModel("resnet18", pretrained=False, critical_points=points, sigma=2.0, **settings)
    generator = torch.Generator().manual_seed(0)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in network.modules():
        for tensor in module.buffers(recurse=False) if module not in norms else ():
            if tensor.ndim == 1 and tensor.is_floating_point():
                tensor.copy_(torch.empty_like(tensor).uniform_(0.5, 2, generator=generator))
    for norm in norms:
        norm.train()
    pictures = torch.rand(4, 3, 64, 64, generator=generator)
    networks = [network.source] if name == "dual" else [network.source, network.cloner]
    for part in networks:
        part(pictures)
    return network.eval()


@torch.no_grad()
def step_by_step(network: Model, images: Tensor) -> InferenceBatch:
    """Return what the model stands for, from its own parts."""
    size = (images.shape[2], images.shape[3])
    images = network.checked_images(images)
    if isinstance(network, KdMultiresolutionDualModel):
        features = network.source(images)
        local, overall = network.predictions(features)
        return network.read(
            network.families(features, local, overall),
            network.positions(features),
            network.as_a_whole(features, local),
            size,
        )
    source, cloner = network.features(images)
    settings = {"value_weight": network.known_value_weight, "terms": network.terms}
    scores = discrepancy(source, cloner, **settings)
    if network.anomaly_map is None:
        return InferenceBatch(pred_score=scores)
    maps = network.anomaly_map_generator(discrepancy_map(source, cloner, size, **settings))
    return InferenceBatch(pred_score=scores, anomaly_map=maps)


def assert_same(ours: InferenceBatch, theirs: InferenceBatch) -> None:
    torch.testing.assert_close(ours.pred_score, theirs.pred_score, rtol=1e-5, atol=0)
    assert (ours.anomaly_map is None) == (theirs.anomaly_map is None)
    if ours.anomaly_map is not None and theirs.anomaly_map is not None:
        scale = float(theirs.anomaly_map.max())
        torch.testing.assert_close(ours.anomaly_map, theirs.anomaly_map, rtol=1e-4, atol=1e-5 * scale)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(3, 3, 64, 96, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("name", "most"), [("score", 75), ("discrepancy", 110), ("dual", 130)])
def test_an_image_takes_few_operators(name: str, most: int) -> None:
    network = make(name)
    assert operators(network, torch.rand(1, 3, 256, 256)).total() <= most


@pytest.mark.parametrize("points", [["layer2", "layer3"], POINTS, [*POINTS, "layer4"]])
@pytest.mark.parametrize("name", FORWARD)
def test_scores_and_maps_are_those_of_the_parts(name: str, points: list[str], images: Tensor) -> None:
    network = make(name, points, **({} if name == "dual" else {"score_points": points}))
    assert_same(network(images), step_by_step(network, images))
    if isinstance(network, KdMultiresolutionDualModel):
        network.judged_as_whole.fill_(value=True)
        assert_same(network(images), step_by_step(network, images))


@pytest.mark.parametrize("terms", ["value", "direction"])
@pytest.mark.parametrize("name", ["score", "discrepancy"])
def test_so_are_those_of_one_term(name: str, terms: str, images: Tensor) -> None:
    network = make(name, terms=terms, score_points=POINTS)
    assert_same(network(images), step_by_step(network, images))


@pytest.mark.parametrize("name", ["score", "discrepancy"])
def test_so_are_those_of_features_that_are_zero(name: str) -> None:
    """Of a position, of a level, of both networks."""
    network = make(name, score_points=POINTS)
    for module in (network.source, network.cloner):
        module.register_forward_hook(lambda _, __, levels: [_with_zeros(level, i) for i, level in enumerate(levels)])
    images = torch.rand(2, 3, 64, 64)
    assert_same(network(images), step_by_step(network, images))
    nothing = [torch.zeros(1, 2, 2, 2)]
    for one, other in ((nothing, nothing), ([torch.ones(1, 2, 2, 2)], nothing)):
        network.source.register_forward_hook(lambda *_, levels=one: levels * 3)
        network.cloner.register_forward_hook(lambda *_, levels=other: levels * 3)
        assert_same(network(images[:1]), step_by_step(network, images[:1]))


@pytest.mark.parametrize("ratio", [1e-3, 1.0, 1e3])
def test_no_digits_are_lost_where_one_network_is_many_times_the_other(ratio: float) -> None:
    generator = torch.Generator().manual_seed(0)
    source, cloner = ([torch.rand(2, 64, 64, 64, generator=generator)] for _ in range(2))
    cloner = [ratio * level for level in cloner]
    settings: dict[str, Any] = {"value_weight": 0.5, "terms": "direction"}
    exact = discrepancy([level.double() for level in source], [level.double() for level in cloner], **settings)
    scores = [fast_scores(source, cloner, **settings), fast_scores_and_maps(source, cloner, (64, 64), **settings)[0]]
    for found in scores:
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)


def _with_zeros(level: Tensor, index: int) -> Tensor:
    return level * (torch.arange(level.shape[-1]) > index)


def optimize(network: Model) -> None:
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    optimizer = torch.optim.Adam(weights, lr=0.01)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()


def load(network: Model) -> None:
    state = network.state_dict()
    network.load_state_dict(
        {k: v * 1.5 if torch.is_tensor(v) and v.is_floating_point() else v for k, v in state.items()}
    )


def edit_in_place(network: Model) -> None:
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.is_floating_point() and tensor.shape != network.anomaly_map_generator.kernel.shape:
                tensor.mul_(1.1)


def train_a_step(network: Model) -> None:
    network.train()
    network(torch.rand(2, 3, 64, 64))  # moves the statistics of batch norm
    optimize(network)
    network.eval()


def replace_a_weight(network: Model) -> None:
    module = next(m for m in network.modules() if isinstance(m, nn.Conv2d) and m.weight.requires_grad)
    module.weight = nn.Parameter(module.weight.detach() * 2)


def change_the_type(network: Model) -> None:
    network.to(torch.bfloat16)
    network.to(torch.float32)


CHANGES = [optimize, load, edit_in_place, train_a_step, replace_a_weight, change_the_type]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", FORWARD)
def test_they_follow_every_change_of_the_weights(name: str, change: Callable[[Model], None], images: Tensor) -> None:
    network = make(name, **({} if name == "dual" else {"score_points": POINTS}))
    before = network(images)
    copied = copy.deepcopy(network)
    change(network)
    after = network(images)
    assert not torch.equal(after.pred_score, before.pred_score)
    assert_same(after, step_by_step(network, images))
    assert_same(copied(images), before)
    change(copied)
    assert_same(copied(images), step_by_step(copied, images))


@pytest.mark.parametrize("name", FORWARD)
def test_files_and_states_are_as_large_as_before(name: str, images: Tensor) -> None:
    network = make(name)
    sizes, keys = [], []
    for _ in range(2):
        file = io.BytesIO()
        torch.save(network, file)
        sizes.append(file.tell())
        keys.append([*network.state_dict()])
        network(images)
    assert keys[0] == keys[1]
    assert sizes[1] < sizes[0] + 10_000


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MAPS, "dual"])
def test_every_map_is_compiled_as_one_graph(name: str, images: Tensor) -> None:
    network = make(name)
    torch.compiler.reset()
    compiled = torch.compile(network, fullgraph=True, backend="eager")  # traces as every backend does, makes no code
    with torch.inference_mode():
        assert_same(compiled(images), network(images))
        images = images * torch.nan
        assert compiled(images).pred_score.isnan().all(), "a graph cannot ask; whoever uses the score does"
