"""Folded networks are the networks, whatever has happened to their weights."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from timm.layers import StdConv2d
from torch import Tensor, nn

from kd_multiresolution.source.derived import Derived
from kd_multiresolution.source.folding import Folding, folded
from kd_multiresolution.source.network import Source
from operators import operators


def source(name: str = "resnet18") -> Source:
    network = Source(name, pretrained=False, critical_points=None)
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(generator=generator).mul_(0.1)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return network


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def assert_folded(folding: Folding, network: Source, images: Tensor) -> None:
    with torch.no_grad():
        for ours, theirs in zip(folding.of(network)(images), network(images), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0", "vgg16_bn", "densenet121", "convnext_atto"])
def test_a_folded_network_is_the_network(name: str, images: Tensor) -> None:
    network, folding = source(name), Folding()
    assert_folded(folding, network, images)
    with torch.no_grad():
        ours, plain = operators(folding.of(network), images), operators(network, images)
    norms = plain["aten::native_batch_norm"]
    assert ours.total() + norms - ours["aten::native_batch_norm"] <= plain.total()
    if name not in {"densenet121", "convnext_atto"}:  # whose norms do not stand behind convolutions
        assert norms > 0
        assert ours["aten::native_batch_norm"] == 0


def test_weights_that_a_layer_standardises_itself_are_left_alone() -> None:
    network = nn.Sequential(StdConv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
    network[1].running_mean.fill_(0.3)
    network[1].running_var.fill_(2)
    assert folded(network) is network


def step(network: nn.Module) -> None:
    network.requires_grad_()
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    for weight in network.parameters():
        weight.grad = torch.full_like(weight, 0.1)
    optimizer.step()
    network.requires_grad_(requires_grad=False)


def replace(network: nn.Module) -> None:
    norm = next(module for module in network.modules() if isinstance(module, nn.BatchNorm2d))
    norm.weight = nn.Parameter(norm.weight.detach() + 1)


def load(network: nn.Module) -> None:
    state = {name: tensor * 2 for name, tensor in network.state_dict().items()}
    network.load_state_dict(state)


def assign(network: nn.Module) -> None:
    state = {name: tensor * 2 for name, tensor in network.state_dict().items()}
    network.load_state_dict(state, assign=True)


@torch.inference_mode()
def edit(network: nn.Module) -> None:
    for tensor in (*network.parameters(), *network.buffers()):
        tensor.mul_(2)


def round_trip(network: nn.Module) -> None:
    network.to(torch.float64)
    network.to(torch.bfloat16)
    network.to(torch.float32)


@pytest.mark.parametrize("change", [step, replace, load, assign, edit, round_trip])
def test_it_follows_every_change_of_the_weights(change: Callable[[nn.Module], None], images: Tensor) -> None:
    network, folding = source(), Folding()
    assert_folded(folding, network, images)
    before = network(images)
    change(network)
    assert not torch.equal(before[-1], network(images)[-1])
    assert_folded(folding, network, images)


def test_it_is_made_once_for_each_state(images: Tensor) -> None:
    network, folding = source(), Folding()
    folded = folding.of(network)
    assert folded is not network
    assert folding.of(network) is folded
    step(network)
    assert folding.of(network) is not folded


def test_edits_that_torch_does_not_count_show_with_the_next_change_of_mode(images: Tensor) -> None:
    network = nn.Sequential(source())
    folding = Folding()
    owner = nn.ModuleList([network, folding]).eval()
    folding.of(network)
    for weight in network.parameters():
        weight.data.mul_(2)
    owner.eval()
    with torch.no_grad():
        for ours, theirs in zip(folding.of(network)(images), network(images), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def test_a_network_that_is_trained_watched_or_compiled_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    network, folding = source(), Folding()
    next(network.children()).training = True
    assert folding.of(network) is network
    network.eval()
    handle = next(network.children()).register_forward_hook(lambda *_: None)
    assert folding.of(network) is network
    handle.remove()
    assert folding.of(network) is not network
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert folding.of(network) is network


def test_copies_and_files_go_without_what_was_made() -> None:
    weight = torch.ones(1000)
    derived: Derived[Tensor] = Derived()
    assert torch.equal(derived.get([weight], lambda: weight * 2), torch.full((1000,), 2.0))
    copied = copy.deepcopy(derived)
    assert torch.equal(copied.get([weight], lambda: weight * 3), torch.full((1000,), 3.0))
    file = io.BytesIO()
    torch.save(derived, file)
    assert file.tell() < 2000


def test_what_was_made_in_inference_mode_can_be_used_outside() -> None:
    weight = torch.ones(3)
    derived: Derived[Tensor] = Derived()
    with torch.inference_mode():
        derived.get([weight], lambda: weight * 2)
    assert not derived.get([weight], lambda: weight * 2).is_inference()


def test_tensors_of_inference_mode_are_never_taken_for_unchanged() -> None:
    derived: Derived[Tensor] = Derived()
    with torch.inference_mode():
        weight = torch.ones(3)
        derived.get([weight], lambda: weight * 2)
        weight.mul_(2)
        assert torch.equal(derived.get([weight], lambda: weight * 2), torch.full((3,), 4.0))


def test_a_thread_gets_what_was_made_for_it() -> None:
    weight = torch.ones(3)
    derived: Derived[str] = Derived()

    class Interrupted:
        """Another thread's turn comes while this one looks whether what it wants is there."""

        def __eq__(self, other: object) -> bool:
            if isinstance(other, Interrupted):
                derived.get([weight], lambda: "another", key="another")
            return isinstance(other, Interrupted)

        __hash__ = object.__hash__

    for _ in range(2):
        assert derived.get([weight], lambda: "wanted", key=Interrupted()) == "wanted"
