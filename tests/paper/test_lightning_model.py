"""Training through anomalib's Engine, on pictures small enough to take seconds."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.metrics import AUROC, Evaluator
from anomalib.pre_processing import PreProcessor
from lightning import seed_everything
from sklearn.metrics import roc_auc_score
from torchvision.transforms.v2 import Resize

from kd_multiresolution import ConvergenceStopping, KdMultiresolution
from kd_multiresolution.plugin.post_processor import RankEvaluator
from tests.data.generated import write_squares


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_squares(tmp_path_factory.mktemp("pictures"), {"good": 10, "defect": 4})


def data(pictures: Path) -> Folder:
    return Folder(
        "squares", root=pictures, normal_dir="good", abnormal_dir="defect",
        train_batch_size=3, eval_batch_size=3, num_workers=0, val_split_mode="same_as_test", seed=0,
    )  # fmt: skip


def model(**arguments: Any) -> KdMultiresolution:
    settings = {"source": "small_vgg", "image_size": 32, "epochs": 2, "visualizer": False, **arguments}
    return KdMultiresolution(**settings)


def engine(folder: Path, **arguments: Any) -> Engine:
    return Engine(default_root_dir=folder, logger=False, enable_progress_bar=False, accelerator="cpu", **arguments)


def fit(network: KdMultiresolution, pictures: Path, folder: Path, **arguments: Any) -> Engine:
    seed_everything(0)
    runner = engine(folder, **arguments)
    runner.fit(network, datamodule=data(pictures))
    return runner


def test_training_moves_the_cloner_and_never_the_source(pictures: Path, tmp_path: Path) -> None:
    network = model(source="resnet18", pretrained=False, critical_points=["layer1", "layer2"])
    before = copy.deepcopy(network.model.state_dict())
    fit(network, pictures, tmp_path)
    after = network.model.state_dict()
    tensors = [name for name in before if isinstance(before[name], torch.Tensor)]
    assert all(torch.equal(before[name], after[name]) for name in tensors if name.startswith("source."))
    moved = [not torch.equal(before[name], after[name]) for name in tensors if name.startswith("cloner.")]
    assert all(moved)


def test_order_of_images_follows_from_the_seed_alone(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on anomalib's command line, which ignores its --seed_everything.
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    losses = []
    for i, seed in enumerate((0, 0, 1)):
        torch.manual_seed(i)
        network = model()
        network.epoch_seeds.seed = seed  # the cloner starts equal in all three
        engine(tmp_path / str(i)).fit(network, datamodule=data(pictures))
        losses.append(float(network.trainer.callback_metrics["train_loss"]))
    assert losses[0] == losses[1] != losses[2]


def test_same_seed_same_figures(pictures: Path, tmp_path: Path) -> None:
    networks = [model(), model()]
    for i, network in enumerate(networks):
        fit(network, pictures, tmp_path / str(i))
    states = [network.model.cloner.state_dict() for network in networks]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_resumed_training_equals_uninterrupted_training(pictures: Path, tmp_path: Path) -> None:
    whole = model(epochs=4, value_weight="auto")
    engine(tmp_path / "whole").fit(whole, datamodule=data(pictures))

    first = engine(tmp_path / "first", max_epochs=2)
    first.fit(model(epochs=4, value_weight="auto"), datamodule=data(pictures))
    torch.manual_seed(9)
    resumed = model(epochs=4, value_weight="auto")
    engine(tmp_path / "second").fit(resumed, datamodule=data(pictures), ckpt_path=first.best_model_path)

    assert resumed.model.value_weight == whole.model.value_weight
    expected = whole.model.cloner.state_dict()
    for name, tensor in resumed.model.cloner.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("scale_channels", [False, True])
def test_auto_weight_makes_both_terms_equal_at_the_start(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, scale_channels: bool
) -> None:
    network = model(value_weight="auto", epochs=1, learning_rate=1e-12, scale_channels=scale_channels)
    with caplog.at_level(logging.INFO, logger="kd_multiresolution"):
        fit(network, pictures, tmp_path)
    trainer = network.trainer
    direction, value = (trainer.callback_metrics[f"train_{name}"] for name in ("direction", "value"))
    # All ten images fit into the first batches, so the means over this epoch without a visible step are the same.
    assert network.model.value_weight * value == pytest.approx(float(direction), rel=0.02)
    assert "value_weight: auto = " in caplog.text


def test_number_of_epochs(pictures: Path, tmp_path: Path) -> None:
    assert fit(model(epochs=3), pictures, tmp_path / "argument").trainer.current_epoch == 3
    runner = fit(model(epochs=3), pictures, tmp_path / "trainer", max_epochs=1)
    assert runner.trainer.current_epoch == 1, "the trainer's own number takes precedence"


def test_training_stops_at_convergence_and_is_validated_and_saved_then(pictures: Path, tmp_path: Path) -> None:
    # Steps of this size do not lower the loss, so the first two windows are equal.
    network = model(epochs=None, learning_rate=1e-12)
    runner = fit(network, pictures, tmp_path, callbacks=[ConvergenceStopping(window=2, tolerance=0.05)])
    assert runner.trainer.current_epoch == 4
    assert not torch.isnan(network.post_processor.image_min)
    checkpoint = torch.load(runner.best_model_path, weights_only=True)
    assert checkpoint["epoch"] == 3


def test_convergence_by_default_only_without_a_number_of_epochs(pictures: Path, tmp_path: Path) -> None:
    stopping = [
        any(isinstance(callback, ConvergenceStopping) for callback in runner.trainer.callbacks)
        for runner in (
            fit(model(epochs=None), pictures, tmp_path / "0", max_epochs=1),
            fit(model(epochs=1), pictures, tmp_path / "1"),
        )
    ]
    assert stopping == [True, False]


def test_printed_auroc_is_that_of_the_raw_scores(pictures: Path, tmp_path: Path) -> None:
    """The scores straddle 1, where torchmetrics would squash some batches and not others."""
    network = model(value_weight=1.0, score_points=["pool4"])
    runner = fit(network, pictures, tmp_path)
    module = data(pictures)
    module.setup()
    batches = [*module.test_dataloader()]

    def scores(value_weight: float) -> list[float]:
        network.eval().model.value_weight = value_weight
        return [score for batch in batches for score in network.model(batch.image).pred_score.tolist()]

    at_one, at_two = (median(scores(weight)) for weight in (1.0, 2.0))
    weight = 1 + (1 - at_one) / (at_two - at_one)
    raw, labels = scores(weight), [label for batch in batches for label in batch.gt_label.tolist()]
    assert min(raw) < 1 < max(raw), "the test needs scores on both sides"
    expected = roc_auc_score(labels, raw)
    assert runner.test(network, datamodule=module)[0]["image_AUROC"] == pytest.approx(expected)

    unprocessed = model(value_weight=weight, score_points=["pool4"], post_processor=False)
    unprocessed.model.load_state_dict(network.model.state_dict())
    assert engine(tmp_path / "raw").test(unprocessed, datamodule=data(pictures))[0]["image_AUROC"] == expected
    predictions = engine(tmp_path / "raw").predict(unprocessed, datamodule=data(pictures))
    assert [score for batch in predictions for score in batch.pred_score.tolist()] == pytest.approx(raw)


@pytest.mark.parametrize(
    ("post_processor", "kind", "warned"),
    [(False, Evaluator, True), (False, RankEvaluator, False), (True, Evaluator, False)],
)
def test_an_evaluator_that_misjudges_raw_scores_is_said(
    post_processor: bool,
    kind: type[Evaluator],
    warned: bool,
    pictures: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    metrics = [AUROC(fields=["pred_score", "gt_label"])]
    network = model(post_processor=post_processor, evaluator=kind(test_metrics=metrics), anomaly_map=None)
    engine(tmp_path).test(network, datamodule=data(pictures))
    assert ("RankEvaluator in its place" in caplog.text) == warned


def test_loaded_model_names_its_source_and_keeps_the_weight_that_auto_found(pictures: Path, tmp_path: Path) -> None:
    network = model(value_weight="auto", epochs=1)
    runner = fit(network, pictures, tmp_path)
    loaded = KdMultiresolution.load_from_checkpoint(runner.best_model_path)
    assert str(loaded.model.source) == str(network.model.source)
    assert "pre-trained" in str(loaded.model.source)
    assert loaded.model.value_weight == network.model.value_weight


@pytest.mark.parametrize("anomaly_map", ["gradient", "smooth_grad"])
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "bf16-true"])
def test_half_precision_scores(pictures: Path, tmp_path: Path, precision: str, anomaly_map: str) -> None:
    network, reference = (model(anomaly_map=anomaly_map, smooth_grad_samples=2) for _ in range(2))
    half = engine(tmp_path / precision, precision=precision).predict(network, datamodule=data(pictures))
    full = engine(tmp_path / "32").predict(reference, datamodule=data(pictures))
    for ours, theirs in zip(half, full, strict=True):
        tolerance = 0.03 if precision == "bf16-true" else 1e-5
        torch.testing.assert_close(ours.pred_score, theirs.pred_score, rtol=tolerance, atol=0)
        assert (ours.anomaly_map > 0).any()


@pytest.mark.parametrize("export_type", ["onnx", "openvino"])
def test_export_of_smooth_grad_and_of_a_source_without_rules_is_refused(tmp_path: Path, export_type: str) -> None:
    with pytest.raises(NotImplementedError, match=f"export_type='{export_type}'.*'discrepancy'.*export_type='torch'"):
        engine(tmp_path).export(model(anomaly_map="smooth_grad"), export_type)
    network = model(source="efficientnet_b0", pretrained=False, critical_points=["blocks.0"])
    with pytest.raises(ValueError, match=r"source='efficientnet_b0'.*attribution_path='cloner'.*'discrepancy'"):
        engine(tmp_path).export(network, export_type)


def test_epochs_hold_where_only_the_time_is_limited(pictures: Path, tmp_path: Path) -> None:
    assert fit(model(epochs=2), pictures, tmp_path, max_time="00:01:00:00").trainer.current_epoch == 2


def test_a_pre_processor_of_ones_own(pictures: Path, tmp_path: Path) -> None:
    network = KdMultiresolution(
        "small_vgg", epochs=1, visualizer=False, pre_processor=PreProcessor(Resize((64, 32), antialias=False))
    )
    fit(network, pictures, tmp_path)
    assert network.input_size == (64, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 33}, r"image_size=\(33, 33\).*multiples of 32"),
        ({"image_size": 0}, r"image_size=\(0, 0\)"),
        ({"image_size": 64, "pre_processor": False}, "image_size=64.*pre-processor"),
        ({"imagenet_normalization": True, "image_size": None, "pre_processor": False}, "imagenet_normalization=True"),
        ({"epochs": 0}, "epochs=0"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0"),
    ],
)
def test_errors_name_the_argument(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(**arguments)
