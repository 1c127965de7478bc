"""The dual model through anomalib's Engine, on pictures small enough to take seconds."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.callbacks import ModelCheckpoint
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.post_processing import PostProcessor
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, OnExceptionCheckpoint
from torch.utils.data import DataLoader, IterableDataset
from torchvision.utils import save_image

from kd_multiresolution import KdMultiresolution, KdMultiresolutionDual
from kd_multiresolution.dual.cycle import STEPS
from kd_multiresolution.dual.painted_defects import out_of_focus
from kd_multiresolution.dual.torch_model import KdMultiresolutionDualModel
from kd_multiresolution.plugin.export_check import FLOAT32, open_vino
from kd_multiresolution.plugin.post_processor import FalseAlarmPostProcessor
from kd_multiresolution.training.batches import training_batches
from tests.data.generated import write_squares

pytestmark = pytest.mark.slow

SIZE = 64


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_squares(tmp_path_factory.mktemp("pictures"), {"good": 20, "defect": 4}, SIZE, contrast=0.5)


def data(pictures: Path, train_batch_size: int = 5) -> Folder:
    return Folder(
        "squares", root=pictures, normal_dir="good", abnormal_dir="defect", normal_split_ratio=0.25,
        train_batch_size=train_batch_size, eval_batch_size=4, num_workers=0, val_split_mode="same_as_test", seed=0,
    )  # fmt: skip


def model(**arguments: Any) -> KdMultiresolutionDual:
    settings = {"source": "small_vgg", "image_size": SIZE, "imagenet_normalization": False}
    return KdMultiresolutionDual(**{**settings, "epochs": 4, "visualizer": False, **arguments})


def engine(folder: Path, **arguments: Any) -> Engine:
    return Engine(default_root_dir=folder, logger=False, enable_progress_bar=False, accelerator="cpu", **arguments)


@pytest.fixture(scope="module")
def trained(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[KdMultiresolutionDual, Engine]:
    network = model(epochs=10, learning_rate=3e-3, imagenet_normalization=True)
    runner = engine(tmp_path_factory.mktemp("trained"))
    runner.fit(network, datamodule=data(pictures))
    return network, runner


def test_training_moves_both_cloners_and_never_the_source(pictures: Path, tmp_path: Path) -> None:
    network = model(epochs=1)
    before = copy.deepcopy(network.model.state_dict())
    engine(tmp_path).fit(network, datamodule=data(pictures))
    after = network.model.state_dict()
    del before["judged_as_whole"], before["position_weight"]  # may be what they were
    for name in (name for name in before if isinstance(before[name], torch.Tensor)):
        assert torch.equal(before[name], after[name]) == name.startswith(("source.", "anomaly_map")), name


def test_finds_bright_squares(pictures: Path, tmp_path: Path) -> None:
    network = model(source="efficientnet_lite0", epochs=10, learning_rate=3e-3, imagenet_normalization=True)
    runner = engine(tmp_path)
    runner.fit(network, datamodule=data(pictures))
    metrics = runner.test(network, datamodule=data(pictures))[0]
    assert metrics["image_AUROC"] == 1.0
    batches = runner.predict(network, data_path=pictures / "defect")
    assert all(batch.pred_label.all() for batch in batches), "beyond the threshold told from normal images"
    masks = torch.cat([batch.pred_mask.reshape(-1, SIZE, SIZE) for batch in batches])
    assert masks[:, 24:32, 24:32].all()


def test_a_batch_of_held_out_images_alone_moves_nothing(pictures: Path, tmp_path: Path) -> None:
    network = model(epochs=1)
    moved = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            self.before = [weight.detach().clone() for weight in pl_module.model.local_cloner.parameters()]

        def on_train_batch_end(
            self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            after = pl_module.model.local_cloner.parameters()
            same = all(torch.equal(now, then) for now, then in zip(after, self.before, strict=True))
            moved.append((batch.image_path[0] in pl_module.held_out.held_out, not same))

    engine(tmp_path, callbacks=[Watch()]).fit(network, datamodule=data(pictures, train_batch_size=1))
    assert {held_out for held_out, _ in moved} == {False, True}
    assert all(held_out != has_moved for held_out, has_moved in moved)


def test_same_seed_same_figures(pictures: Path, tmp_path: Path) -> None:
    networks = [model(epochs=1), model(epochs=1)]
    for i, network in enumerate(networks):
        engine(tmp_path / str(i)).fit(network, datamodule=data(pictures))
    states = [network.state_dict() for network in networks]
    tensors = [name for name, value in states[0].items() if isinstance(value, torch.Tensor)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in tensors)


def test_resumed_training_equals_uninterrupted_training(pictures: Path, tmp_path: Path) -> None:
    whole = model()
    checkpoints = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True)
    engine(tmp_path / "whole", callbacks=[checkpoints]).fit(whole, datamodule=data(pictures))
    torch.manual_seed(9)
    resumed = model()
    engine(tmp_path / "second").fit(resumed, datamodule=data(pictures), ckpt_path=tmp_path / "epoch=1.ckpt")
    for epoch in range(4):
        saved = torch.load(tmp_path / f"epoch={epoch}.ckpt", weights_only=True)["state_dict"]
        assert saved["post_processor._image_threshold"].isfinite(), "every checkpoint knows what is normal"
        assert not saved["model.family_weight"].eq(1).all()
    expected = whole.state_dict()
    for name, value in resumed.state_dict().items():
        if isinstance(value, torch.Tensor) and not name.startswith("evaluator"):
            torch.testing.assert_close(value, expected[name], rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.fixture(scope="module")
def interrupted(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the checkpoint after the first of two epochs."""
    folder = tmp_path_factory.mktemp("interrupted")
    checkpoints = ModelCheckpoint(folder, "{epoch}", save_top_k=-1, every_n_epochs=1, save_on_train_epoch_end=True)
    engine(folder, callbacks=[checkpoints]).fit(model(epochs=2), datamodule=data(pictures))
    return folder / "epoch=0.ckpt"


@pytest.mark.parametrize(
    ("arguments", "batch_size", "message"),
    [
        ({"epochs": 3}, 5, "steps=12: the training that is resumed began with 8"),
        ({"epochs": 2}, 3, "steps=12: the training that is resumed began with 8"),
        ({"epochs": 2, "learning_rate": 1e-3}, 5, "learning_rate=0.001: .* began with 0.004"),
        ({"epochs": 2, "seed": 1}, 5, "held out other images than seed=1 chooses"),
    ],
)
def test_a_training_of_another_length_rate_or_seed_is_not_resumed(
    interrupted: Path, pictures: Path, tmp_path: Path, arguments: dict[str, Any], batch_size: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        engine(tmp_path).fit(model(**arguments), datamodule=data(pictures, batch_size), ckpt_path=interrupted)


def test_a_training_that_ends_early_is_calibrated_and_warns(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stopping = EarlyStopping("train_loss", min_delta=1e9, patience=1, check_on_train_epoch_end=True)
    network = model(epochs=4)
    engine(tmp_path, callbacks=[stopping]).fit(network, datamodule=data(pictures))
    assert network.post_processor.image_threshold.isfinite()
    assert any("ended after 8 of 16 steps" in message for message in caplog.messages)
    caplog.clear()
    engine(tmp_path).fit(model(epochs=1), datamodule=data(pictures))
    assert not any("has ended after" in message for message in caplog.messages)


def test_an_untrained_model_says_that_it_has_no_threshold(
    trained: tuple[KdMultiresolutionDual, Engine], pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine(tmp_path).predict(model(), data_path=pictures / "defect")
    assert any("No threshold of images and pixels is known" in message for message in caplog.messages)
    caplog.clear()
    engine(tmp_path).predict(trained[0], data_path=pictures / "defect")
    assert not any("No threshold of images and pixels is known" in message for message in caplog.messages)


def test_checkpoint_keeps_all_statistics(
    trained: tuple[KdMultiresolutionDual, Engine], pictures: Path, tmp_path: Path
) -> None:
    network, runner = trained
    loaded = KdMultiresolutionDual.load_from_checkpoint(runner.best_model_path)
    assert isinstance(loaded.model, KdMultiresolutionDualModel)
    assert isinstance(loaded.post_processor, FalseAlarmPostProcessor)
    images = torch.rand(2, 3, SIZE, SIZE)
    ours, theirs = network.eval()(images), loaded.eval()(images)
    assert torch.equal(ours.pred_score, theirs.pred_score)
    assert torch.equal(ours.anomaly_map, theirs.anomaly_map)


def test_validation_images_do_not_move_the_threshold(
    trained: tuple[KdMultiresolutionDual, Engine], pictures: Path, tmp_path: Path
) -> None:
    network, _ = trained
    before = network.post_processor.image_threshold.clone()
    assert before.isfinite()
    assert network.post_processor.pixel_threshold.isfinite()
    engine(tmp_path).validate(network, datamodule=data(pictures))
    assert torch.equal(network.post_processor.image_threshold, before)


def test_anomalibs_own_post_processor_works_on_top(pictures: Path, tmp_path: Path) -> None:
    network = model(epochs=1, post_processor=PostProcessor())
    runner = engine(tmp_path)
    runner.fit(network, datamodule=data(pictures))
    assert network.post_processor.image_threshold.isfinite()
    assert runner.test(network, datamodule=data(pictures))[0]["image_AUROC"] >= 0


def test_number_of_epochs_follows_from_the_steps(pictures: Path, tmp_path: Path, monkeypatch: Any) -> None:
    assert STEPS == 1400, "as documented"
    monkeypatch.setattr("kd_multiresolution.dual.cycle.STEPS", 7)
    runner = engine(tmp_path / "steps")
    runner.fit(model(epochs=None), datamodule=data(pictures))
    assert runner.trainer.current_epoch == 2, "four batches each"
    runner = engine(tmp_path / "trainer", max_steps=5, max_epochs=-1)
    network = model(epochs=None)
    runner.fit(network, datamodule=data(pictures))
    assert runner.trainer.global_step == 5
    assert network.post_processor.image_threshold.isfinite(), "a training that ends within an epoch is calibrated too"


def test_rate_falls_to_zero_with_the_last_step(pictures: Path, tmp_path: Path) -> None:
    rates = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    engine(tmp_path, callbacks=[Watch()]).fit(model(epochs=2, learning_rate=1e-2), datamodule=data(pictures))
    assert max(rates) == pytest.approx(1e-2, rel=0.1)
    assert rates[-1] < 1e-6


def test_weights_decay_as_documented_and_held_out_features_are_freed(pictures: Path, tmp_path: Path) -> None:
    network = model(epochs=1)
    decays, held = [], []

    class Watch(Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            decays.extend(group["weight_decay"] for group in optimizer.param_groups)
            held.append(len(pl_module.held_out._normal))

    engine(tmp_path, callbacks=[Watch()]).fit(network, datamodule=data(pictures))
    assert set(decays) == {1.0}
    assert min(held) > 0
    assert not network.held_out._normal


def test_a_training_that_fails_leaves_a_model_that_is_free(pictures: Path, tmp_path: Path) -> None:
    network = model()
    hooks = []

    class Fail(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            hooks.append(len(pl_module.model._forward_pre_hooks))
            assert pl_module.held_out._normal
            msg = "no further"
            raise RuntimeError(msg)

    with pytest.raises(RuntimeError, match="no further"):
        engine(tmp_path, callbacks=[Fail()]).fit(network, datamodule=data(pictures))
    assert hooks == [1], "the model is calibrated before its evaluations"
    assert not network.model._forward_pre_hooks
    kept = network.held_out
    assert not [*kept._normal, *kept._blurred, *kept._defective]
    file = network.to_torch(tmp_path)
    images = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    loaded = torch.load(file, weights_only=False)["model"]
    assert torch.equal(loaded.eval()(images).pred_score, network.eval()(images).pred_score)


def test_a_checkpoint_on_an_exception_is_calibrated(pictures: Path, tmp_path: Path) -> None:
    class Fail(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 2:
                msg = "no further"
                raise RuntimeError(msg)

    callbacks = [Fail(), OnExceptionCheckpoint(tmp_path, "broken")]
    with pytest.raises(RuntimeError, match="no further"):
        engine(tmp_path, callbacks=callbacks).fit(model(), datamodule=data(pictures))
    state = torch.load(tmp_path / "broken.ckpt", weights_only=False)["state_dict"]
    assert bool(state["post_processor._image_threshold"].isfinite())
    assert not bool((state["model.family_weight"] == 1).all())


def test_a_loader_without_a_length_is_refused_in_words(pictures: Path, tmp_path: Path) -> None:
    module = data(pictures)
    module.setup()

    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(module.train_dataloader())

    loader = DataLoader(Stream(), batch_size=None)
    for epochs in (None, 2):
        with pytest.raises(ValueError, match="nothing says how many there are"):
            engine(tmp_path).fit(model(epochs=epochs), train_dataloaders=loader)


@pytest.mark.parametrize("export_type", ["onnx", "openvino"])
def test_exports_by_the_ordinary_route(
    trained: tuple[KdMultiresolutionDual, Engine], tmp_path: Path, export_type: str
) -> None:
    network, runner = trained
    path = runner.export(network, export_type, export_root=tmp_path)
    images = torch.rand(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    expected = network.eval()(images)
    if export_type == "onnx":
        session = pytest.importorskip("onnxruntime").InferenceSession(path)
        names = [output.name for output in session.get_outputs()]
        outputs = dict(zip(names, session.run(None, {"input": images.numpy()}), strict=True))
    else:
        outputs = open_vino(path, FLOAT32)(images.numpy())
    for name in ("pred_score", "anomaly_map"):
        value = torch.from_numpy(outputs[name]).reshape(getattr(expected, name).shape)
        torch.testing.assert_close(value, getattr(expected, name), rtol=1e-3, atol=1e-4)


def test_grey_pictures_not_square(tmp_path: Path) -> None:
    root = tmp_path / "grey"
    (root / "good").mkdir(parents=True)
    (root / "defect").mkdir()
    for i in range(8):
        save_image(torch.rand(1, 50, 70), root / ("good" if i else "defect") / f"{i}.png")
    network = model(epochs=1, image_size=(48, 80))
    runner = engine(tmp_path)
    runner.fit(network, datamodule=data(root))
    batches = runner.predict(network, data_path=root / "good")
    assert all(batch.anomaly_map.shape[-2:] == (48, 80) for batch in batches)


def test_too_few_images_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "few"
    for folder in ("good", "defect"):
        (root / folder).mkdir(parents=True)
        save_image(torch.rand(3, SIZE, SIZE), root / folder / "0.png")
        save_image(torch.rand(3, SIZE, SIZE), root / folder / "1.png")
    with pytest.raises(ValueError, match=r"[12] training images: KdMultiresolutionDual.*Give it 4 or more"):
        engine(tmp_path).fit(model(), datamodule=data(root))


def test_mixed_precision_compares_features_of_the_same_precision(pictures: Path, tmp_path: Path) -> None:
    network = model(epochs=1)
    engine(tmp_path, precision="bf16-mixed", callbacks=[Compared()]).fit(network, datamodule=data(pictures))


class Compared(Callback):
    """What was kept of the held-out images is what the source makes of them in a training step's precision."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: KdMultiresolutionDual) -> None:
        kept_of = pl_module.held_out
        images = torch.cat(
            [
                batch.image[[i for i, path in enumerate(batch.image_path) if path in kept_of.held_out]]
                for batch in training_batches(trainer, pl_module)
            ]
        )
        for context, close in (
            (torch.autocast("cpu", torch.bfloat16), True),
            (torch.autocast("cpu", enabled=False), False),
        ):
            with torch.no_grad(), context:
                features = pl_module.model.source(pl_module.model.checked_images(images))
            for ours, kept in zip(features, kept_of._normal, strict=True):
                assert kept.dtype == torch.float32
                assert ours.float().sum().isclose(kept.sum(), rtol=1e-5) == close
            blurred = out_of_focus(images)
            with torch.no_grad(), context:
                features = pl_module.model.source(blurred)
            for ours, kept in zip(features, kept_of._blurred, strict=True):
                assert ours.float().sum().isclose(kept.sum(), rtol=1e-5) == close


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"false_alarm_rate": 0.5}, "false_alarm_rate=0.5: .* above 0 and below 0.5"),
        ({"false_alarm_rate": 0.1, "post_processor": PostProcessor()}, "false_alarm_rate=0.1: configures our own"),
        ({"false_alarm_rate": 0.1, "post_processor": False}, "leave out post_processor=False"),
        ({"image_size": 60}, r"image_size=\(60, 60\).*multiples of 16"),
    ],
)
def test_errors_name_the_argument(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(**arguments)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"cloner": "equal"}, "cloner"),
        ({"anomaly_map": None}, "anomaly_map"),
        ({"score_points": ["pool4"]}, "score_points"),
        ({"percentile_scale": True}, "percentile_scale"),
    ],
)
def test_arguments_of_the_papers_model_are_none_of_this_ones(arguments: dict[str, Any], name: str) -> None:
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        model(**arguments)


def test_defaults() -> None:
    network = KdMultiresolutionDual("small_vgg")
    assert network.input_size == (256, 256)
    assert "Normalize" in str(network.pre_processor.transform)
    assert "Normalize" not in str(KdMultiresolution("small_vgg").pre_processor.transform)
