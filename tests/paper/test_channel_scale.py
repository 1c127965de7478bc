"""Features in units of each channel: measured on the training images, kept in checkpoints, part of every gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.transforms.v2.functional import to_dtype

from kd_multiresolution import KdMultiresolution
from kd_multiresolution.paper.channel_scale import ChannelScale
from kd_multiresolution.paper.discrepancy import discrepancy
from kd_multiresolution.paper.torch_model import KdMultiresolutionModel
from tests.paper.test_lightning_model import data, engine, fit, model, pictures

__all__ = ["pictures"]  # the fixture


def scaled(**arguments: Any) -> KdMultiresolution:
    return model(scale_channels=True, **arguments)


@pytest.fixture(scope="module")
def trained(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> KdMultiresolution:
    network = scaled(epochs=1)
    network.checkpoint = fit(network, pictures, tmp_path_factory.mktemp("trained")).best_model_path
    return network


def test_channels_have_a_mean_square_of_one_on_the_training_images(trained: KdMultiresolution, pictures: Path) -> None:
    training = data(pictures)
    training.setup()
    images = torch.stack([to_dtype(item.image, torch.float32) for item in training.train_data])
    with torch.no_grad():
        own = trained.model.source(images)
    for level, units in zip(own, trained.model.in_units(own), strict=True):
        spread = level.square().mean((0, 2, 3)).sqrt()
        alive = spread > 0.02 * spread.mean()
        assert alive.sum() > len(alive) / 2
        torch.testing.assert_close(
            units.square().mean((0, 2, 3))[alive], torch.ones(int(alive.sum())), rtol=1e-4, atol=0
        )
        assert (units.square().mean((0, 2, 3)) < 1.001).all(), "a channel that is always zero is not blown up"


@pytest.mark.parametrize("cache", [None, "float16"])
def test_whatever_is_kept_the_scale_is_the_same(
    trained: KdMultiresolution, pictures: Path, tmp_path: Path, cache: str | None
) -> None:
    network = scaled(epochs=1, cache=cache)
    fit(network, pictures, tmp_path)
    for ours, theirs in zip(network.model.channel_scale.factors, trained.model.channel_scale.factors, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=0)


def test_a_step_learns_in_these_units(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, losses = KdMultiresolution.training_step, []

    def recorded(self: KdMultiresolution, batch: Any, *args: Any) -> torch.Tensor:
        loss = step(self, batch, *args)
        with torch.no_grad():
            units, cloner = self.model.features(batch.image)
            own = self.model.source(batch.image)
        losses.append([float(loss), *(float(discrepancy(x, cloner, value_weight=0.5).mean()) for x in (units, own))])
        return loss

    monkeypatch.setattr(KdMultiresolution, "training_step", recorded)
    fit(scaled(epochs=1), pictures, tmp_path)
    assert len(losses) == 3
    for ours, in_units, in_its_own in losses:
        assert ours == pytest.approx(in_units, rel=1e-4)
        assert ours != pytest.approx(in_its_own, rel=0.05)


def test_a_model_is_scored_in_these_units(trained: KdMultiresolution, pictures: Path) -> None:
    """The source's own scales are without effect: a source of twice the activations gives the same scores."""
    network = KdMultiresolution.load_from_checkpoint(trained.checkpoint).model.eval()
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before = network(images)
    doubled = network.source.forward
    network._folded_source.of = lambda source: source  # type: ignore[method-assign]
    network.source.forward = lambda images: [2 * level for level in doubled(images)]  # type: ignore[method-assign]
    for factor in network.channel_scale.factors:
        factor /= 2
    after = network(images)
    torch.testing.assert_close(after.pred_score, before.pred_score)
    torch.testing.assert_close(after.anomaly_map, before.anomaly_map)


@pytest.mark.parametrize("path", ["both", "cloner"])
@pytest.mark.parametrize("anomaly_map", ["gradient", "guided_backprop"])
def test_explicit_gradients_are_autograds(path: str, anomaly_map: str) -> None:
    arguments = {"anomaly_map": anomaly_map, "attribution_path": path, "scale_channels": True}
    networks = [
        KdMultiresolutionModel("small_vgg", **arguments, explicit_backward=explicit) for explicit in (False, True)
    ]
    generator = torch.Generator().manual_seed(0)
    squares = [0.01 + torch.rand(factor.numel(), generator=generator) for factor in networks[0].channel_scale.factors]
    images = torch.rand(2, 3, 32, 32, generator=generator)
    found = []
    for network in networks:
        network.channel_scale.measure(squares)
        found.append(network.eval()(images))
    torch.testing.assert_close(found[0].pred_score, found[1].pred_score)
    torch.testing.assert_close(found[0].anomaly_map, found[1].anomaly_map, rtol=1e-4, atol=1e-9)
    unscaled = KdMultiresolutionModel("small_vgg", **{**arguments, "scale_channels": False}).eval()(images)
    assert not torch.allclose(found[0].pred_score, unscaled.pred_score, rtol=0.05)
    assert not torch.allclose(found[0].anomaly_map, unscaled.anomaly_map, rtol=0.05)


def test_validation_scores_are_in_these_units(trained: KdMultiresolution) -> None:
    network = trained.model.eval()
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    scores = network.scored(images, network.source(images)).pred_score
    torch.testing.assert_close(scores, network(images).pred_score, rtol=1e-4, atol=0)


def test_resumed_training_keeps_the_scale(pictures: Path, tmp_path: Path) -> None:
    whole = scaled(epochs=2, value_weight="auto")
    engine(tmp_path / "whole").fit(whole, datamodule=data(pictures))
    first = engine(tmp_path / "first", max_epochs=1)
    first.fit(scaled(epochs=2, value_weight="auto"), datamodule=data(pictures))
    resumed = scaled(epochs=2, value_weight="auto")
    engine(tmp_path / "second").fit(resumed, datamodule=data(pictures), ckpt_path=first.best_model_path)
    assert resumed.model.value_weight == whole.model.value_weight
    for name, tensor in whole.model.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            assert torch.equal(tensor, resumed.model.state_dict()[name]), name


def test_a_second_training_goes_on_in_the_same_units(
    trained: KdMultiresolution, pictures: Path, tmp_path: Path
) -> None:
    network = KdMultiresolution.load_from_checkpoint(trained.checkpoint)
    before = [factor.clone() for factor in network.model.channel_scale.factors]
    fewer = data(pictures)
    fewer.train_batch_size = 2
    engine(tmp_path, limit_train_batches=1).fit(network, datamodule=fewer)
    for ours, theirs in zip(network.model.channel_scale.factors, before, strict=True):
        assert torch.equal(ours, theirs), "the cloner has learnt to imitate the source in them"


def test_checkpoints_of_the_other_kind_are_refused_in_words(
    trained: KdMultiresolution, pictures: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"trained with scale_channels=True; the model was built with .*=False"):
        engine(tmp_path).test(model(), datamodule=data(pictures), ckpt_path=trained.checkpoint)
    older = torch.load(trained.checkpoint, weights_only=True)
    del older["kd_multiresolution"]["built"]["scale_channels"]
    torch.save(older, tmp_path / "older.ckpt")
    with pytest.raises(ValueError, match=r"trained with scale_channels=False; the model was built with .*=True"):
        engine(tmp_path).test(scaled(), datamodule=data(pictures), ckpt_path=tmp_path / "older.ckpt")


def test_without_it_a_model_is_as_published() -> None:
    names = KdMultiresolutionModel("small_vgg").state_dict()
    assert not any("channel_scale" in name for name in names)


def test_before_they_are_measured_features_are_the_sources_own() -> None:
    features = [torch.rand(1, 2, 3, 3), torch.rand(1, 4, 1, 1)]
    for ours, theirs in zip(ChannelScale([2, 4])(features), features, strict=True):
        assert torch.equal(ours, theirs)
