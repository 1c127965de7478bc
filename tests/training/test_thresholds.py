"""Thresholds belong to the weights they stand beside, however a training ends and whatever is validated on the way."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.callbacks import ModelCheckpoint
from anomalib.data import Folder, ImageBatch
from anomalib.engine import Engine
from anomalib.metrics import AUROC, Evaluator
from anomalib.post_processing import PostProcessor
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, StochasticWeightAveraging, Timer

from kd_multiresolution import KdMultiresolution, KdMultiresolutionDual
from kd_multiresolution.plugin.post_processor import UnclampedPostProcessor, forget
from kd_multiresolution.training.thresholds import Thresholds
from tests.data.generated import write_squares

pytestmark = pytest.mark.slow

Model = KdMultiresolution | KdMultiresolutionDual
MODELS = [KdMultiresolution, KdMultiresolutionDual]
EPOCHS = 3
STEPS = 4  # per epoch


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_squares(tmp_path_factory.mktemp("pictures"), {"good": 18, "defect": 4})


def data(pictures: Path) -> Folder:
    return Folder(
        "squares", root=pictures, normal_dir="good", abnormal_dir="defect", train_batch_size=4, eval_batch_size=4,
        num_workers=0, val_split_mode="same_as_test", seed=0,
    )  # fmt: skip


def make(kind: type[Model], **arguments: Any) -> Model:
    return kind(**{"source": "small_vgg", "image_size": 32, "sigma": 1.0, "visualizer": False, **arguments})


def fit(network: Model, pictures: Path, folder: Path, callbacks: Sequence[Callback] = (), **arguments: Any) -> Engine:
    engine = Engine(
        default_root_dir=folder, callbacks=[*callbacks], logger=False, enable_progress_bar=False, accelerator="cpu",
        **{"max_epochs": EPOCHS, **arguments},
    )  # fmt: skip
    engine.fit(network, datamodule=data(pictures))
    return engine


def checkpoints(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.name: torch.load(path, weights_only=True) for path in sorted(folder.rglob("*.ckpt"))}


def thresholds(checkpoint: dict[str, Any]) -> tuple[float, float]:
    state = checkpoint["state_dict"]
    return float(state["post_processor._image_threshold"]), float(state["post_processor._pixel_threshold"])


def fitted_anew(kind: type[Model], checkpoint: Path, pictures: Path, folder: Path) -> tuple[float, float]:
    """Return the thresholds that a validation of a checkpoint gives."""
    network = kind.load_from_checkpoint(checkpoint, visualizer=False)
    network.post_processor.forget_pixels()
    engine = Engine(default_root_dir=folder, logger=False, enable_progress_bar=False, accelerator="cpu")
    engine.validate(network, datamodule=data(pictures))
    return float(network.post_processor.image_threshold), float(network.post_processor.pixel_threshold)


class StopInTheEnd(Callback):
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = True


class StopAfterTwo(Callback):
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch == 1


class StopInTheMiddle(Callback):
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        trainer.should_stop = trainer.global_step == STEPS + 2


def ends() -> dict[str, tuple[list[Callback], dict[str, Any]]]:
    """Ways in which a training can end without an exception."""
    early = EarlyStopping("train_loss", min_delta=1.0, patience=1)
    timer = Timer(timedelta(seconds=0.01), interval="epoch")
    return {
        "epochs": ([], {}),
        "steps": ([], {"max_epochs": -1, "max_steps": STEPS + 2}),
        "early stopping": ([early], {}),
        "at an epoch's end": ([StopInTheEnd()], {}),
        "in its middle": ([StopInTheMiddle()], {}),
        "time": ([timer], {}),
        "rare validation": ([], {"check_val_every_n_epoch": 2}),
        "after a rare validation": ([StopAfterTwo()], {"check_val_every_n_epoch": 2}),
    }


@pytest.mark.parametrize("end", list(ends()))
@pytest.mark.parametrize("kind", MODELS)
def test_a_checkpoint_of_the_last_weights_has_its_thresholds(
    kind: type[Model], end: str, pictures: Path, tmp_path: Path
) -> None:
    callbacks, arguments = ends()[end]
    network = make(kind)
    fit(network, pictures, tmp_path, callbacks, **arguments)
    (checkpoint,) = checkpoints(tmp_path).values()
    present = (float(network.post_processor.image_threshold), float(network.post_processor.pixel_threshold))
    assert not torch.tensor(present).isnan().any()
    if end != "rare validation":  # where Lightning writes no checkpoint of the last epoch
        assert present == thresholds(checkpoint)
        for name, tensor in network.model.state_dict().items():
            if torch.is_tensor(tensor):
                assert torch.equal(checkpoint["state_dict"][f"model.{name}"], tensor), name
    if kind is KdMultiresolution:
        (path,) = tmp_path.rglob("*.ckpt")
        assert fitted_anew(kind, path, pictures, tmp_path / "again") == pytest.approx(thresholds(checkpoint), rel=1e-5)


class Remove(StopAfterTwo):
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for path in Path(trainer.default_root_dir).rglob("*.ckpt"):
            path.unlink()


def test_a_checkpoint_that_cannot_be_read_does_not_end_a_finished_training(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    network = make(KdMultiresolution)
    fit(network, pictures, tmp_path, [Remove()], check_val_every_n_epoch=2)
    assert "The last checkpoint has no threshold of pixels" in caplog.text
    assert bool(network.post_processor.pixel_threshold.isfinite())


class Raise(Callback):
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step == STEPS + 2:
            msg = "a callback's"
            raise RuntimeError(msg)


class Interrupt(Callback):
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step == STEPS + 2:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(("callback", "kind_of_end"), [(Raise(), RuntimeError), (Interrupt(), SystemExit)])
@pytest.mark.parametrize("kind", MODELS)
def test_so_has_the_last_one_of_a_training_that_is_broken_off(
    kind: type[Model], callback: Callback, kind_of_end: type[BaseException], pictures: Path, tmp_path: Path
) -> None:
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    network = make(kind)
    try:
        with pytest.raises(kind_of_end):
            fit(network, pictures, tmp_path, [callback])
    finally:
        signal.signal(signal.SIGINT, handler)
    (path,) = tmp_path.rglob("*.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["global_step"] == STEPS, "the last whole epoch, from which a training goes on"
    found = thresholds(checkpoint)
    (state,) = (part for part in checkpoint["callbacks"].values() if "_pixel_threshold" in part)
    assert [float(state[f"_{name}_threshold"]) for name in ("image", "pixel")] == [*found], "Lightning restores it last"
    if kind is KdMultiresolution:
        assert fitted_anew(kind, path, pictures, tmp_path / "again") == pytest.approx(found, rel=1e-5)
        weights = {name: tensor for name, tensor in checkpoint["state_dict"].items() if "cloner" in name}
        assert any(not torch.equal(network.state_dict()[name], tensor) for name, tensor in weights.items())
    else:
        assert not torch.tensor(found).isnan().any()
    fit(make(kind), pictures, tmp_path / "on")  # nothing is left behind that would disturb the next one


@pytest.mark.parametrize("kind", MODELS)
def test_every_kept_checkpoint_has_thresholds(kind: type[Model], pictures: Path, tmp_path: Path) -> None:
    network = make(kind)
    fit(network, pictures, tmp_path, [ModelCheckpoint(every_n_train_steps=3, save_top_k=-1)])
    found = checkpoints(tmp_path)
    by_step = {checkpoint["global_step"]: thresholds(checkpoint) for checkpoint in found.values()}
    assert {3, 6, 9, 12} <= by_step.keys()
    assert not torch.tensor([*by_step.values()]).isnan().any()
    assert len({*by_step.values()}) == len(by_step)


class Count(Callback):
    """Counts the epochs that are validated, and the maps that validation computes."""

    def __init__(self) -> None:
        self.epochs: list[int] = []

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.epochs.append(trainer.current_epoch)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(("interval", "epochs"), [(None, [0, 1, 2]), (1, [0, 1, 2]), (2, [1])])
def test_validation_runs_as_often_as_the_trainer_says(
    kind: type[Model], interval: int | None, epochs: list[int], pictures: Path, tmp_path: Path
) -> None:
    count = Count()
    arguments = {} if interval is None else {"check_val_every_n_epoch": interval}
    trainer = fit(make(kind), pictures, tmp_path, [count], **arguments).trainer
    assert count.epochs == epochs
    assert trainer.check_val_every_n_epoch == (interval or 1)


def evaluator() -> Evaluator:
    return Evaluator(
        val_metrics=[
            AUROC(fields=["pred_score", "gt_label"], prefix="image_"),
        ]
    )


@pytest.mark.parametrize("kind", MODELS)
def test_a_metric_of_validation_is_there_after_every_epoch(kind: type[Model], pictures: Path, tmp_path: Path) -> None:
    seen = []

    class Watch(EarlyStopping):
        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            super().on_validation_end(trainer, pl_module)
            seen.append(float(trainer.callback_metrics["image_AUROC"]))

    stopping = Watch("image_AUROC", mode="max", patience=10)
    fit(make(kind, evaluator=evaluator()), pictures, tmp_path, [stopping])
    assert len(seen) == EPOCHS


class Listen(Callback):
    def __init__(self) -> None:
        self.outputs: list[Any] = []

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: ImageBatch, *args: Any
    ) -> None:
        self.outputs.append(outputs)


@pytest.mark.parametrize("kind", MODELS)
def test_who_takes_the_batches_of_validation_gets_scores_and_maps(
    kind: type[Model], pictures: Path, tmp_path: Path
) -> None:
    listen = Listen()
    fit(make(kind), pictures, tmp_path, [listen])
    assert listen.outputs
    for outputs in listen.outputs:
        assert outputs.pred_score.shape == (len(outputs.image),)
        assert outputs.anomaly_map.shape == (len(outputs.image), 32, 32)


@pytest.mark.parametrize(("map_", "expected"), [("gradient", 1), ("discrepancy", EPOCHS)])
def test_maps_that_are_gradients_are_computed_when_they_are_needed(
    map_: str, expected: int, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = make(KdMultiresolution, anomaly_map=map_)
    images = []
    generate = network.model.anomaly_map_generator.forward

    def counted(attribution: torch.Tensor) -> torch.Tensor:
        images.append(len(attribution))
        return generate(attribution)

    monkeypatch.setattr(network.model.anomaly_map_generator, "forward", counted)
    fit(network, pictures, tmp_path)
    module = data(pictures)
    module.setup()
    assert sum(images) == expected * len(module.val_data)


@pytest.mark.parametrize("interval", [1, 2])
def test_an_overwritten_checkpoint_has_the_threshold_of_images_and_none_of_other_weights_pixels(
    interval: int, pictures: Path, tmp_path: Path
) -> None:
    found = []

    class Look(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            found.extend(thresholds(checkpoint) for checkpoint in checkpoints(tmp_path).values())

    checkpoint = ModelCheckpoint(tmp_path, save_on_train_epoch_end=True)
    fit(make(KdMultiresolution), pictures, tmp_path, [Look(), checkpoint], check_val_every_n_epoch=interval)
    images, pixels = map(torch.tensor, zip(*found, strict=True))
    assert len(found) == EPOCHS - 1
    assert not images.isnan().any()
    assert pixels.isnan().all()


def test_a_post_processor_of_anomalib_sees_every_map(pictures: Path, tmp_path: Path) -> None:
    found = []

    class Look(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            found.extend(checkpoint["state_dict"] for checkpoint in checkpoints(tmp_path).values())

    fit(make(KdMultiresolution, post_processor=PostProcessor()), pictures, tmp_path, [Look()])
    assert len(found) == EPOCHS - 1
    assert not any(state["post_processor.pixel_max"].isnan() for state in found)


@pytest.mark.parametrize("kind", MODELS)
def test_averaged_weights_get_thresholds_of_their_own(kind: type[Model], pictures: Path, tmp_path: Path) -> None:
    network = make(kind)
    averaging = StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=1)
    engine = fit(network, pictures, tmp_path, [averaging])
    before = (float(network.post_processor.image_threshold), float(network.post_processor.pixel_threshold))
    engine.trainer.save_checkpoint(tmp_path / "averaged.ckpt")
    assert thresholds(torch.load(tmp_path / "averaged.ckpt", weights_only=True)) == before
    if kind is KdMultiresolution:
        again = fitted_anew(kind, tmp_path / "averaged.ckpt", pictures, tmp_path / "again")
        assert again == pytest.approx(before, rel=1e-5)
    engine.test(network, datamodule=data(pictures))


@pytest.mark.parametrize("kind", MODELS)
def test_averages_that_would_have_no_thresholds_are_refused(kind: type[Model], pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"EMAWeightAveraging averages .* Use StochasticWeightAveraging"):
        fit(make(kind), pictures, tmp_path, [EMAWeightAveraging(decay=0.9)])


@pytest.fixture(scope="module", params=MODELS)
def without_thresholds(
    request: pytest.FixtureRequest, pictures: Path, tmp_path_factory: pytest.TempPathFactory
) -> Model:
    """A model that knows no threshold: trained without validation images, or not trained."""
    if request.param is KdMultiresolutionDual:
        return make(KdMultiresolutionDual)
    network = make(KdMultiresolution, anomaly_map="discrepancy")  # soon exported
    fit(network, pictures, tmp_path_factory.mktemp("run"), limit_val_batches=0)
    return network


@pytest.mark.parametrize("verb", ["test", "predict"])
def test_a_model_without_thresholds_gives_no_labels(
    without_thresholds: Model, verb: str, pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    answers: list[Any] = []

    class Take(Callback):
        def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
            answers.append(outputs)

        on_predict_batch_end = on_test_batch_end

    engine = Engine(
        default_root_dir=tmp_path, callbacks=[Take()], logger=False, enable_progress_bar=False, accelerator="cpu"
    )
    getattr(engine, verb)(without_thresholds, datamodule=data(pictures))
    assert answers
    for answer in answers:
        assert answer.pred_score is not None
        assert answer.pred_label is None
        assert answer.pred_mask is None
    assert "No threshold of images and pixels is known, so there are no labels and masks" in caplog.text


def test_nor_does_its_export(without_thresholds: Model, tmp_path: Path) -> None:
    answer = without_thresholds.eval()(torch.rand(2, 3, 32, 32))
    assert answer.pred_label is None
    assert answer.pred_mask is None
    import onnxruntime

    path = without_thresholds.to_onnx(tmp_path)
    outputs = [output.name for output in onnxruntime.InferenceSession(str(path)).get_outputs()]
    assert sorted(outputs) == ["anomaly_map", "pred_score"]


@pytest.mark.parametrize("kind", MODELS)
def test_labels_are_there_after_a_training(kind: type[Model], pictures: Path, tmp_path: Path) -> None:
    network = make(kind)
    fit(network, pictures, tmp_path)
    answer = network.eval()(torch.rand(2, 3, 32, 32))
    assert answer.pred_label is not None
    assert answer.pred_mask is not None


def test_nothing_is_fitted_twice(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    own = Thresholds.fit

    def counted(self: Thresholds, *args: Any, **kwargs: Any) -> None:
        before = dict(self._fitted)
        own(self, *args, **kwargs)
        passes.append(before != self._fitted)

    monkeypatch.setattr(Thresholds, "fit", counted)
    fit(make(KdMultiresolution), pictures, tmp_path)
    assert sum(passes) == 1, "for the last checkpoint; not again at the end"


def test_a_post_processor_that_was_given_has_its_threshold_from_validation(pictures: Path, tmp_path: Path) -> None:
    network = make(KdMultiresolutionDual, post_processor=UnclampedPostProcessor(), epochs=1)
    fit(network, pictures, tmp_path)
    assert network.post_processor.image_threshold.isfinite()
    assert network.post_processor.pixel_threshold.isfinite()


def test_a_given_post_processor_of_the_dual_model_is_fitted_as_well(pictures: Path, tmp_path: Path) -> None:
    network = make(KdMultiresolutionDual, post_processor=UnclampedPostProcessor())
    steps = ModelCheckpoint(every_n_train_steps=3, save_top_k=-1)
    fit(network, pictures, tmp_path, [steps], check_val_every_n_epoch=2)
    found = {path: thresholds(checkpoint) for path, checkpoint in checkpoints(tmp_path).items()}
    assert not torch.tensor([*found.values()]).isnan().any()
    assert len({*found.values()}) > 2
    fitted = network.post_processor
    present = (float(fitted.image_threshold), float(fitted.pixel_threshold))
    forget(fitted, "image", "pixel")
    Engine(default_root_dir=tmp_path, logger=False, accelerator="cpu").validate(network, datamodule=data(pictures))
    assert present == pytest.approx((float(fitted.image_threshold), float(fitted.pixel_threshold)), rel=1e-5)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_thresholds_on_the_way_are_of_the_scores_that_a_test_gives(
    precision: str, pictures: Path, tmp_path: Path
) -> None:
    """Where maps are gradients, a test scores in full precision, and a validation on the way goes without maps."""
    every = ModelCheckpoint(every_n_epochs=1, save_top_k=-1)
    fit(make(KdMultiresolution), pictures, tmp_path, [every], precision=precision)
    for path in tmp_path.rglob("*.ckpt"):
        found, _ = thresholds(torch.load(path, weights_only=True))
        anew, _ = fitted_anew(KdMultiresolution, path, pictures, tmp_path / path.stem)
        assert found == pytest.approx(anew, rel=1e-5)
