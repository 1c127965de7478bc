"""A pre-processor is the model's own wherever it is made, anomalib's tiled ensemble included."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import anomalib.models
import pytest
import torch
from anomalib.pipelines.tiled_ensemble.components.utils import NormalizationStage
from anomalib.pipelines.tiled_ensemble.components.utils.helper_functions import get_ensemble_model
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Trainer
from torchvision.transforms.v2 import Compose, Normalize, Resize
from torchvision.transforms.v2 import functional as F  # noqa: N812

from kd_multiresolution import KdMultiresolution, KdMultiresolutionDual
from kd_multiresolution.plugin.pre_processor import warn_of_other_normalization

SIZES = {KdMultiresolution: (128, 128), KdMultiresolutionDual: (256, 256)}


def prepared(pre_processor: Any, images: torch.Tensor) -> torch.Tensor:
    return pre_processor.transform(images)


@pytest.mark.parametrize("kind", list(SIZES))
def test_the_class_configures_what_an_instance_has(kind: Any) -> None:
    images = torch.rand(2, 3, 70, 90, generator=torch.Generator().manual_seed(0))
    for size, own in ((None, {}), ((64, 64), {"image_size": 64})):
        instance = kind(pretrained=False, **own)
        configured = kind.configure_pre_processor(size)
        assert torch.equal(prepared(configured, images), prepared(instance.pre_processor, images))
    assert prepared(kind.configure_pre_processor(), images).shape[-2:] == SIZES[kind]


def test_the_dual_model_normalises_and_the_papers_does_not() -> None:
    images = torch.full((1, 3, 64, 64), 0.5)
    paper, dual = (prepared(kind.configure_pre_processor((64, 64)), images) for kind in SIZES)
    assert torch.equal(paper, images)
    assert torch.allclose(dual, F.normalize(images, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))


NUMBERS = {
    "resnet18.tv_in1k": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    "efficientnet_lite0": ([0.5, 0.5, 0.5], [0.5, 0.5, 0.5]),
    "small_vgg": ([0.4, 0.45, 0.5], [0.25, 0.3, 0.35]),
}


@pytest.mark.parametrize("source", NUMBERS)
@pytest.mark.parametrize("kind", list(SIZES))
def test_images_are_normalised_as_the_source_was_trained(kind: Any, source: str) -> None:
    images = torch.rand(1, 3, 64, 64)
    expected = F.normalize(images, *NUMBERS[source])
    model = kind(source, pretrained=False, image_size=64, imagenet_normalization=True)
    configured = kind.configure_pre_processor((64, 64), imagenet_normalization=True, source=source)
    for pre_processor in (model.pre_processor, configured):
        assert torch.equal(prepared(pre_processor, images), expected)
    plain = kind(source, pretrained=False, image_size=64, imagenet_normalization=False)
    assert torch.equal(prepared(plain.pre_processor, images), images)


def test_a_checkpoint_carries_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = KdMultiresolutionDual("small_vgg", image_size=64, visualizer=False)
    trainer = Trainer(logger=False, default_root_dir=tmp_path, accelerator="cpu")
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    monkeypatch.setattr("kd_multiresolution.plugin.pre_processor.normalization_of", lambda _: ((0.0,) * 3, (1.0,) * 3))
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(prepared(KdMultiresolutionDual("small_vgg", image_size=64).pre_processor, images), images)
    loaded = KdMultiresolutionDual.load_from_checkpoint(tmp_path / "model.ckpt")
    assert torch.equal(prepared(loaded.pre_processor, images), F.normalize(images, *NUMBERS["small_vgg"]))


@pytest.mark.parametrize("kind", list(SIZES))
def test_a_pre_processor_made_for_another_source_is_said(kind: Any, caplog: pytest.LogCaptureFixture) -> None:
    imagenets = KdMultiresolutionDual.configure_pre_processor((64, 64))
    assert kind("resnet18", pretrained=False, pre_processor=imagenets)
    assert kind("small_vgg", pre_processor=KdMultiresolution.configure_pre_processor((64, 64)))
    assert "pre_processor" not in caplog.text
    assert kind("small_vgg", pre_processor=imagenets).pre_processor is imagenets
    assert "with mean (0.485, 0.456, 0.406) and deviation" in caplog.text
    assert "source 'small_vgg' was trained with (0.4, 0.45, 0.5)" in caplog.text


@pytest.mark.parametrize("source", ["unknown_vgg", "resnet18.no_such_tag"])
def test_a_source_of_which_nothing_is_known_is_not_normalised_by_guess(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kd_multiresolution.source.images.timm_name_of", lambda name: name)
    with pytest.raises(ValueError, match=f"source='{source}'.*does not say how.*imagenet_normalization=false"):
        KdMultiresolutionDual.configure_pre_processor(source=source)
    own = PreProcessor(Normalize([0.1] * 3, [1.0] * 3))
    warn_of_other_normalization(own, source)  # there is nothing to hold it against


@pytest.mark.parametrize(
    ("transform", "said"),
    [
        (Normalize([0.5], [0.5]), False),
        (Compose([Resize((64, 64)), Compose([Normalize([0.5] * 3, [0.5] * 3)])]), False),
        (Compose([Resize((64, 64)), Compose([Normalize([0.485] * 3, [0.5] * 3)])]), True),
        (Resize((64, 64)), False),
        (None, False),
    ],
)
def test_numbers_are_found_wherever_they_stand(transform: Any, said: bool, caplog: pytest.LogCaptureFixture) -> None:
    warn_of_other_normalization(PreProcessor(transform), "efficientnet_lite0")
    assert ("was trained with (0.5, 0.5, 0.5)" in caplog.text) is said


@pytest.mark.parametrize("kind", list(SIZES))
def test_a_tile_of_anomalibs_ensemble_is_prepared_as_an_image_is(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # As in docs/own_data.md: anomalib's ensemble fails at any model's init_args.
    monkeypatch.setattr(anomalib.models, "TileModel", partial(kind, "small_vgg"), raising=False)
    model = get_ensemble_model({"class_path": "TileModel"}, (64, 64), NormalizationStage.IMAGE)
    transform = model.pre_processor.transform
    parts = [] if transform is None else [type(part) for part in transform.transforms]
    assert Resize not in parts, "the ensemble resizes tiles itself"
    assert (Normalize in parts) is (kind is KdMultiresolutionDual)
    tiles = torch.rand(2, 3, 64, 64)
    assert model.eval()(tiles).anomaly_map.shape[-2:] == (64, 64)
    checkpoint: dict[str, Any] = {"state_dict": {}}
    model.on_save_checkpoint(checkpoint)  # which describes the transform that is left
