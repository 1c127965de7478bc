from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from kd_multiresolution.source.light_vgg import WEIGHTS, WIDTHS, LightVGG, load_light_vgg

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "train_light_source.py"


def test_five_pools_halve_the_picture_and_have_the_stated_channels() -> None:
    activations, shapes = torch.rand(1, 3, 96, 64), []
    for layer in load_light_vgg().features:
        activations = layer(activations)
        if isinstance(layer, nn.MaxPool2d):
            shapes.append(tuple(activations.shape[1:]))
    assert shapes == [(block[-1], 96 >> level, 64 >> level) for level, block in enumerate(WIDTHS, start=1)]


def test_network_is_light() -> None:
    parameters = sum(p.numel() for p in LightVGG().parameters())
    assert 4e5 <= parameters <= 6e5
    assert 4 * parameters <= WEIGHTS.stat().st_size <= 2e6


def test_wheel_weights_say_how_they_came_about() -> None:
    with safe_open(WEIGHTS, framework="pt") as file:
        how = {key: json.loads(value) for key, value in file.metadata().items()}
    assert (SCRIPT.parents[1] / how["script"]).resolve() == SCRIPT.resolve()
    assert how["steps"] > 0
    assert how["seed"] >= 0
    # Guessing is right once in `classes` times.
    assert all(share > 20 / how["classes"] for share in how["accuracy"].values())
    assert list(how["accuracy"]) == ["pool2", "pool3", "pool4", "pool5"]


def test_wheel_weights_are_finite_and_no_channel_of_a_pool_is_dead() -> None:
    network = load_light_vgg()
    assert not network.training
    activations = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    activations[::2] = nn.functional.interpolate(activations[::2, :, ::8, ::8], size=64)
    for layer in network.features:
        activations = layer(activations)
        if isinstance(layer, nn.MaxPool2d):
            assert activations.isfinite().all()
            assert (activations.amax((0, 2, 3)) > 0).float().mean() > 0.8


def test_features_are_identical_after_saving_and_loading(tmp_path: Path) -> None:
    network, images = LightVGG().eval(), torch.rand(2, 3, 64, 64)
    save_file(network.state_dict(), tmp_path / "own.safetensors")
    assert torch.equal(load_light_vgg(tmp_path / "own.safetensors")(images), network(images))
    assert torch.equal(load_light_vgg()(images), load_light_vgg()(images))
    assert not torch.equal(load_light_vgg(None)(images), load_light_vgg()(images))


def test_folding_batch_norm_changes_nothing() -> None:
    torch.manual_seed(0)
    network = LightVGG(batch_norm=True).double()
    for norm in (m for m in network.features if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.normal_(norm.bias)
    network.eval()
    images = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    plain = network.fused()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in plain.modules())
    torch.testing.assert_close(plain(images), network(images), rtol=1e-10, atol=1e-12)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_folding_a_plain_network_copies_it() -> None:
    network, images = LightVGG().eval(), torch.rand(1, 3, 32, 32)
    plain = network.fused()
    assert torch.equal(plain(images), network(images))
    assert plain.features[0].weight.data_ptr() != network.features[0].weight.data_ptr()


def test_missing_and_foreign_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"weights=.*none\.safetensors.*expected"):
        load_light_vgg(tmp_path / "none.safetensors")
    save_file({"features.0.weight": torch.zeros(8, 3, 3, 3)}, tmp_path / "foreign.safetensors")
    with pytest.raises(RuntimeError, match=r"features\.0\.weight"):
        load_light_vgg(tmp_path / "foreign.safetensors")


def test_training_script_writes_weights_that_load_and_repeat(tmp_path: Path) -> None:
    def trained(name: str) -> LightVGG:
        options = "--steps 3 --batch_size 4 --size 32 --per_family 1 --held_out_batches 1 --num_workers 0 --seed 5"
        command = [sys.executable, str(SCRIPT), "--output", str(tmp_path / name), *options.split()]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == 0, done.stderr
        assert "held-out accuracy over 22 classes" in done.stdout
        return load_light_vgg(tmp_path / name)

    first, second = trained("first.safetensors"), trained("second.safetensors")
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(first(images), second(images))
    with safe_open(tmp_path / "first.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["steps"]) == 3
        assert json.loads(file.metadata()["seed"]) == 5
