"""A pre-processor is the model's own wherever it is made, anomalib's tiled ensemble included."""

from __future__ import annotations

from functools import partial
from typing import Any

import anomalib.models
import pytest
import torch
from anomalib.pipelines.tiled_ensemble.components.utils import NormalizationStage
from anomalib.pipelines.tiled_ensemble.components.utils.helper_functions import get_ensemble_model
from torchvision.transforms.v2 import Normalize, Resize
from torchvision.transforms.v2 import functional as F  # noqa: N812

from kd_multiresolution import KdMultiresolution, KdMultiresolutionDual

SIZES = {KdMultiresolution: (128, 128), KdMultiresolutionDual: (256, 256)}


def prepared(pre_processor: Any, images: torch.Tensor) -> torch.Tensor:
    return pre_processor.transform(images)


@pytest.mark.parametrize("kind", list(SIZES))
def test_the_class_configures_what_an_instance_has(kind: Any) -> None:
    images = torch.rand(2, 3, 70, 90, generator=torch.Generator().manual_seed(0))
    instance = kind("light_vgg")
    assert torch.equal(prepared(kind.configure_pre_processor(), images), prepared(instance.pre_processor, images))
    small = kind("light_vgg", image_size=64)
    assert torch.equal(prepared(kind.configure_pre_processor((64, 64)), images), prepared(small.pre_processor, images))
    assert prepared(kind.configure_pre_processor(), images).shape[-2:] == SIZES[kind]


def test_the_dual_model_normalises_and_the_papers_does_not() -> None:
    images = torch.full((1, 3, 64, 64), 0.5)
    paper, dual = (prepared(kind.configure_pre_processor((64, 64)), images) for kind in SIZES)
    assert torch.equal(paper, images)
    assert torch.allclose(dual, F.normalize(images, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))


@pytest.mark.parametrize("kind", list(SIZES))
def test_a_tile_of_anomalibs_ensemble_is_prepared_as_an_image_is(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # As in docs/own_data.md: anomalib's ensemble fails at any model's init_args.
    monkeypatch.setattr(anomalib.models, "TileModel", partial(kind, "light_vgg"), raising=False)
    model = get_ensemble_model({"class_path": "TileModel"}, (64, 64), NormalizationStage.IMAGE)
    transform = model.pre_processor.transform
    parts = [] if transform is None else [type(part) for part in transform.transforms]
    assert Resize not in parts, "the ensemble resizes tiles itself"
    assert (Normalize in parts) is (kind is KdMultiresolutionDual)
    tiles = torch.rand(2, 3, 64, 64)
    assert model.eval()(tiles).anomaly_map.shape[-2:] == (64, 64)
    checkpoint: dict[str, Any] = {"state_dict": {}}
    model.on_save_checkpoint(checkpoint)  # which describes the transform that is left
