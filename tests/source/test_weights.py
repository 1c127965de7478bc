"""Where the source's weights come from, and files that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

from kd_multiresolution.source.network import Source
from tests.conftest import shared_path


def test_partial_weight_file_is_enough_for_the_levels_it_holds() -> None:
    file = shared_path("data/weights/resnet18.tv_in1k-conv1-to-layer3.safetensors")
    source = Source("resnet18.tv_in1k", weights=file, critical_points=["layer1", "layer2", "layer3"])
    weights = safetensors.torch.load_file(file)
    own = {name.removeprefix("stages.network.model."): tensor for name, tensor in source.state_dict().items()}
    assert all(torch.equal(own[name], tensor) for name, tensor in weights.items())
    with pytest.raises(ValueError, match=r"(?s)source_weights=.*layer4.*choose earlier critical_points"):
        Source("resnet18.tv_in1k", weights=file)


def test_weights_that_cannot_be_had_name_three_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_hub(*args: object, **kwargs: object) -> None:
        msg = "no route to host"
        raise ConnectionError(msg)

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", no_hub)
    with pytest.raises(
        RuntimeError, match=r"(?s)\(1\).*HF_HOME.*\(2\) source_weights=.*\(3\) source='efficientnet_lite0'"
    ):
        Source("resnet18.tv_in1k")


def test_weight_files_that_do_not_fit(tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.safetensors"
    garbage.write_bytes(b"not weights")
    with pytest.raises(ValueError, match="not a readable"):
        Source("small_vgg", weights=garbage)
    other = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"features.0.weight": torch.zeros(3, 3, 3, 3)}, other)
    with pytest.raises(ValueError, match="1 have another shape"):
        Source("small_vgg", weights=other)
