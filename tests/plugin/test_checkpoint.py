"""Checkpoints say what they are, hold all that is needed, and run no code when they are loaded."""

from __future__ import annotations

import inspect
import pickle
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.cli.cli import AnomalibCLI
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.models import AnomalibModule, Padim
from torch.utils.data import DataLoader, Subset

from kd_multiresolution import KdMultiresolution, KdMultiresolutionDual, __version__
from kd_multiresolution.plugin.checkpoint import KEY
from kd_multiresolution.plugin.threshold_data import ThresholdData
from kd_multiresolution.results.visualizer import FrameVisualizer
from kd_multiresolution.source.network import Source
from tests.data.generated import write_squares

SETTINGS: dict[str, Any] = {"source": "small_vgg", "image_size": 32, "epochs": 1, "visualizer": False}
BOTH = (KdMultiresolution, KdMultiresolutionDual)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_squares(tmp_path_factory.mktemp("pictures"), {"good": 6, "defect": 2})


def data(pictures: Path) -> Folder:
    return Folder(
        "parts", root=pictures, normal_dir="good", abnormal_dir="defect", normal_test_dir="defect", num_workers=0,
        train_batch_size=3, val_split_mode="same_as_test",
    )  # fmt: skip


def engine(folder: Path) -> Engine:
    settings = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Engine(default_root_dir=folder, **settings)


@pytest.fixture(scope="module")
def checkpoints(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each model, and one of PaDiM."""
    networks: dict[str, AnomalibModule] = {model_class.__name__: model_class(**SETTINGS) for model_class in BOTH}
    networks["Padim"] = Padim(
        "resnet18", ["layer1"], pre_trained=False, n_features=4, visualizer=False,
        pre_processor=Padim.configure_pre_processor((32, 32)),
    )  # fmt: skip
    found = {}
    for name, network in networks.items():
        runner = engine(tmp_path_factory.mktemp(name))
        runner.fit(network, datamodule=data(pictures))
        found[name] = Path(runner.best_model_path)
    return found


@pytest.fixture
def changed(checkpoints: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """A checkpoint of the paper's model with another entry about itself."""

    def change(entry: dict[str, Any] | None) -> Path:
        checkpoint = torch.load(checkpoints["KdMultiresolution"], weights_only=True)
        checkpoint[KEY] = {**checkpoint[KEY], **entry} if entry is not None else None
        torch.save(checkpoint, tmp_path / "changed.ckpt")
        return tmp_path / "changed.ckpt"

    return change


@pytest.mark.parametrize("model_class", BOTH)
def test_a_checkpoint_says_what_the_model_was_built_with(
    model_class: type[AnomalibModule], checkpoints: dict[str, Path]
) -> None:
    entry = torch.load(checkpoints[model_class.__name__], weights_only=True)[KEY]
    assert (entry["model"], entry["version"]) == (model_class.__name__, __version__)
    expected = {
        KdMultiresolution: (
            4, ["pool2", "pool3", "pool4", "pool5"],
            {"source", "cloner", "cloner_bias", "cloner_batch_norm", "scale_channels"},
        ),
        KdMultiresolutionDual: (7, ["pool2", "pool3", "pool4"], {"source"}),
    }  # fmt: skip
    written_format, points, arguments = expected[model_class]
    assert entry["format"] == model_class.checkpoint_entry.format == written_format
    assert entry["built"]["critical_points"] == points
    assert entry["built"].keys() == {*arguments, "critical_points"}


@pytest.mark.parametrize(
    ("trained", "model_class", "given", "message"),
    [
        (
            "KdMultiresolution", KdMultiresolution, {"source": "resnet18", "pretrained": False},
            "trained with source='small_vgg', .*source='resnet18'",
        ),
        (
            "KdMultiresolution", KdMultiresolution, {"critical_points": ["pool3", "pool4"]},
            r"critical_points=\['pool2', .*built with .*\['pool3', ",
        ),
        (
            "KdMultiresolution", KdMultiresolution, {"cloner": "equal"},
            "trained with cloner='compact'; .* cloner='equal'",
        ),
        ("KdMultiresolution", KdMultiresolution, {"cloner_bias": True}, "cloner_bias=False"),
        ("KdMultiresolution", KdMultiresolution, {"cloner_batch_norm": False}, "cloner_batch_norm=True"),
        (
            "KdMultiresolution", KdMultiresolutionDual, {},
            "says model KdMultiresolution: load it with KdMultiresolution, not with KdMultiresolutionDual",
        ),
        (
            "KdMultiresolutionDual", KdMultiresolution, {},
            "says model KdMultiresolutionDual: load it with KdMultiresolutionDual, not with KdMultiresolution",
        ),
        (
            "KdMultiresolutionDual", KdMultiresolutionDual, {"critical_points": ["pool3", "pool4"]},
            r"critical_points=\['pool2'",
        ),
        ("Padim", KdMultiresolution, {}, "not a checkpoint of KdMultiresolution:"),
        ("Padim", KdMultiresolutionDual, {}, "not a checkpoint of KdMultiresolutionDual:"),
    ],
)  # fmt: skip
def test_another_models_checkpoint_is_refused(
    trained: str, model_class: type[AnomalibModule], given: dict[str, Any], message: str, checkpoints: dict[str, Path],
    pictures: Path, tmp_path: Path,
) -> None:  # fmt: skip
    network = model_class(**{**SETTINGS, **given})
    with pytest.raises(ValueError, match=message):
        engine(tmp_path).test(network, datamodule=data(pictures), ckpt_path=checkpoints[trained])
    if trained != "Padim" and "pretrained" not in given:
        with pytest.raises(ValueError, match=message):
            model_class.load_from_checkpoint(checkpoints[trained], **given)


def test_a_newer_versions_checkpoint_is_refused(changed: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=r"a later state of kd_multiresolution \(9.1\).* cannot read it"):
        KdMultiresolution.load_from_checkpoint(
            changed({"format": KdMultiresolution.checkpoint_entry.format + 1, "version": "9.1"})
        )


def test_a_dual_checkpoint_of_other_layers_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = torch.load(checkpoints["KdMultiresolutionDual"], weights_only=True)
    checkpoint[KEY]["format"] = KdMultiresolutionDual.checkpoint_entry.oldest_format - 1
    torch.save(checkpoint, tmp_path / "old.ckpt")
    with pytest.raises(ValueError, match=r"earlier state .* train it again"):
        KdMultiresolutionDual.load_from_checkpoint(tmp_path / "old.ckpt")


@pytest.fixture
def before_the_split(checkpoints: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """Both checkpoints as they were while there was one model, in two variants."""
    parameters = {name: one for model in BOTH for name, one in inspect.signature(model).parameters.items()}
    components = ("pre_processor", "post_processor", "evaluator", "visualizer")
    defaults = {name: parameter.default for name, parameter in parameters.items() if name not in components}
    files = {}
    for variant, name in (("paper", "KdMultiresolution"), ("dual", "KdMultiresolutionDual")):
        checkpoint = torch.load(checkpoints[name], weights_only=True)
        entry = checkpoint[KEY]
        del entry["model"]
        entry["format"] = {"paper": 3, "dual": 4}[variant]
        others = {"cloner": "compact", "cloner_bias": False, "cloner_batch_norm": True}
        entry["built"] = {**others, **entry["built"], "variant": variant}
        known = checkpoint["hyper_parameters"]
        assert "variant" not in known
        checkpoint["hyper_parameters"] = {**defaults, **known, "variant": variant}
        files[name] = tmp_path / f"{variant}.ckpt"
        torch.save(checkpoint, files[name])
    return files


@pytest.mark.parametrize("model_class", [KdMultiresolution])  # the dual model's of that time are refused
def test_a_checkpoint_that_says_variant_is_loaded_into_its_model(
    model_class: type[AnomalibModule],
    before_the_split: dict[str, Path],
    checkpoints: dict[str, Path],
    pictures: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    name = model_class.__name__
    new = model_class.load_from_checkpoint(checkpoints[name])
    assert not caplog.messages
    loaded = model_class.load_from_checkpoint(before_the_split[name])
    said = [message for message in caplog.messages if "variant" in message]
    variant = {"KdMultiresolution": "paper", "KdMultiresolutionDual": "dual"}[name]
    assert said == [f"variant='{variant}' is no argument any more: use the model {name}."]
    assert loaded.hparams == new.hparams, "a checkpoint of it says variant no more"
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(*pair) for pair in zip(loaded.eval()(images), new.eval()(images), strict=True))
    engine(tmp_path).test(model_class(**SETTINGS), datamodule=data(pictures), ckpt_path=before_the_split[name])


@pytest.mark.parametrize(
    ("trained", "model_class", "message"),
    [
        ("KdMultiresolutionDual", KdMultiresolution, "variant='dual'.* KdMultiresolutionDual"),
        ("KdMultiresolution", KdMultiresolutionDual, "variant='paper'.* KdMultiresolution[.,]"),
    ],
)
def test_a_checkpoint_that_says_another_variant_names_its_model(
    trained: str,
    model_class: type[AnomalibModule],
    message: str,
    before_the_split: dict[str, Path],
    pictures: Path,
    tmp_path: Path,
) -> None:
    file = before_the_split[trained]
    with pytest.raises(ValueError, match=message):
        model_class.load_from_checkpoint(file)
    with pytest.raises(ValueError, match=f"says {message}"):
        engine(tmp_path).test(model_class(**SETTINGS), datamodule=data(pictures), ckpt_path=file)
    model = [f"--model={model_class.__name__}", "--model.source=small_vgg", "--model.image_size=32"]
    run = ["--trainer.accelerator=cpu", "--trainer.logger=false", f"--default_root_dir={tmp_path}"]
    with pytest.raises(ValueError, match=f"says {message}"):
        AnomalibCLI(args=["predict", *model, *run, f"--ckpt_path={file}", f"--data={pictures / 'defect'}"])


@pytest.mark.parametrize("model_class", BOTH)
def test_an_entry_that_names_no_model_is_the_papers(
    model_class: type[AnomalibModule], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    checkpoint = torch.load(checkpoints[model_class.__name__], weights_only=True)
    del checkpoint[KEY]["model"]
    assert "variant" not in checkpoint[KEY]["built"]
    torch.save(checkpoint, tmp_path / "unnamed.ckpt")
    if model_class is KdMultiresolution:
        model_class.load_from_checkpoint(tmp_path / "unnamed.ckpt")
    else:
        with pytest.raises(ValueError, match=r"says model KdMultiresolution: load it with KdMultiresolution, not with"):
            model_class.load_from_checkpoint(tmp_path / "unnamed.ckpt")


def test_what_does_not_decide_shapes_may_differ(
    checkpoints: dict[str, Path],
    changed: Callable[..., Path],
    pictures: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    same = KdMultiresolution(**SETTINGS)
    engine(tmp_path).test(same, datamodule=data(pictures), ckpt_path=checkpoints["KdMultiresolution"])
    assert "thresholds" not in caplog.text
    assert "not heeded" not in caplog.text
    network = KdMultiresolution(
        **{**SETTINGS, "image_size": 64}, anomaly_map="discrepancy", score_points=["pool5"], seed=3,
        critical_points=["pool5", "pool4", "pool3", "pool2"],
    )  # fmt: skip
    engine(tmp_path).test(network, datamodule=data(pictures), ckpt_path=checkpoints["KdMultiresolution"])
    assert "image_size=[64, 64]: not heeded, images are prepared as in the checkpoint's training" in caplog.text
    assert network.pre_processor.transform.size == [SETTINGS["image_size"]] * 2
    fitted, given = "score_points=['pool3', 'pool4', 'pool5'], anomaly_map='gradient'", "['pool5'], anomaly_map='disc"
    assert re.search(f"were fitted with {re.escape(fitted)}, the model has .*{re.escape(given)}", caplog.text)
    assert KdMultiresolution.load_from_checkpoint(changed(None)), "of a version that wrote no entry"


@pytest.mark.parametrize("model_class", BOTH)
def test_a_visualizer_that_is_given_is_used_where_the_training_went_without(
    model_class: type[AnomalibModule], checkpoints: dict[str, Path]
) -> None:
    path, own = checkpoints[model_class.__name__], FrameVisualizer()
    assert model_class.load_from_checkpoint(path).visualizer is None
    assert model_class.load_from_checkpoint(path, visualizer=own).visualizer is own
    assert isinstance(model_class.load_from_checkpoint(path, visualizer=True).visualizer, FrameVisualizer)


def test_a_checkpoint_knows_which_data_its_threshold_was_told_from(
    checkpoints: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    model = KdMultiresolution.load_from_checkpoint(checkpoints["KdMultiresolution"], pretrained=False)
    same = data(pictures)
    same.setup()
    assert model.threshold_data == ThresholdData.of(same)
    assert model.threshold_data.split == "same_as_test"
    # A training without validation images has none, and no threshold: the old one is that of other weights.
    other = data(write_squares(tmp_path, {"good": 6, "defect": 2}))
    Engine(default_root_dir=tmp_path, logger=False, accelerator="cpu", limit_val_batches=0).fit(model, datamodule=other)
    assert model.threshold_data is None
    assert not model.learnt.scores
    state = model.post_processor.state_dict().values()
    assert all(tensor.isnan().all() for tensor in state)


def test_a_data_module_of_ones_own_is_trained_on(pictures: Path, tmp_path: Path) -> None:
    class Part(Folder):
        def _setup(self, stage: str | None = None) -> None:
            super()._setup(stage)
            self.val_data = Subset(self.train_data, [0, 1])

    own = Part("parts", root=pictures, normal_dir="good", num_workers=0, val_split_mode="none")
    own.val_dataloader = lambda: DataLoader(own.val_data, 2, collate_fn=own.train_data.collate_fn)
    model = KdMultiresolution(**SETTINGS)
    engine(tmp_path).fit(model, datamodule=own)
    assert model.threshold_data is not None


def test_what_a_dual_training_found_stays(checkpoints: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    same = KdMultiresolutionDual.load_from_checkpoint(checkpoints["KdMultiresolutionDual"])
    assert not caplog.messages
    other = KdMultiresolutionDual.load_from_checkpoint(
        checkpoints["KdMultiresolutionDual"], image_score="whole", false_alarm_rate=0.3
    )
    assert caplog.messages[-1].startswith("image_score='whole', false_alarm_rate=0.3: not heeded, images are judged as")
    assert other.model.judged_as_whole == same.model.judged_as_whole
    assert other.post_processor.image_threshold == same.post_processor.image_threshold
    KdMultiresolutionDual.load_from_checkpoint(checkpoints["KdMultiresolutionDual"], sigma=2.0)
    assert re.search(r"fitted with sigma=4.0, the model has sigma=2.0: .* trained anew", caplog.messages[-1])


def test_train_says_that_it_tests_the_old_checkpoint(
    pictures: Path, checkpoints: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    network = KdMultiresolution(**{**SETTINGS, "epochs": 3})
    engine(tmp_path).train(network, datamodule=data(pictures), ckpt_path=checkpoints["KdMultiresolution"])
    assert "figures of the checkpoint, after epoch 1; the training has just ended with epoch 3" in caplog.text
    caplog.clear()
    engine(tmp_path).train(KdMultiresolution(**{**SETTINGS, "epochs": 2}), datamodule=data(pictures))
    assert "figures of the checkpoint" not in caplog.text


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def test_loading_runs_no_code(checkpoints: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(checkpoints["KdMultiresolution"], weights_only=True)
    for file, content in (("model.ckpt", checkpoint), ("source.pth", checkpoint["state_dict"])):
        torch.save({**content, "more": Malicious(tmp_path / "touched")}, tmp_path / file)
    with pytest.raises(ValueError, match=r"source_weights='.*source.pth': not a readable"):
        Source("small_vgg", weights=tmp_path / "source.pth")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        KdMultiresolution.load_from_checkpoint(tmp_path / "model.ckpt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        engine(tmp_path).test(
            KdMultiresolution(**SETTINGS), datamodule=data(pictures), ckpt_path=tmp_path / "model.ckpt"
        )
    assert not (tmp_path / "touched").exists()
    torch.load(tmp_path / "model.ckpt", weights_only=False)
    assert (tmp_path / "touched").exists(), "the file does what the test is about"


@pytest.mark.parametrize("model_class", BOTH)
def test_nothing_is_asked_of_the_network(
    model_class: type[AnomalibModule],
    pictures: Path,
    checkpoints: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_network(*_: Any) -> None:
        msg = "a connection was asked for"
        raise AssertionError(msg)

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    points = ["layer1", "layer2"]
    network = model_class(**{**SETTINGS, "source": "resnet18"}, pretrained=False, critical_points=points)
    runner = engine(tmp_path)
    runner.fit(network, datamodule=data(pictures))
    runner.test(network, datamodule=data(pictures))
    runner.predict(model_class.load_from_checkpoint(checkpoints[model_class.__name__]), data_path=pictures / "defect")


@pytest.mark.parametrize("model_class", BOTH)
def test_same_seed_same_figures_to_the_bit(model_class: type[AnomalibModule], pictures: Path, tmp_path: Path) -> None:
    figures = []
    for run in ("first", "second"):
        torch.manual_seed(len(run))  # of what came before nothing may be left
        network = model_class(**{**SETTINGS, "epochs": 2})
        runner = engine(tmp_path / run)
        runner.fit(network, datamodule=data(pictures))
        metrics = runner.test(network, datamodule=data(pictures), verbose=False)
        batches = runner.predict(network, datamodule=data(pictures))
        scores = [batch.pred_score for batch in batches] + [batch.anomaly_map for batch in batches]
        figures.append((metrics, float(runner.trainer.callback_metrics.get("train_loss", 0)), scores))
    assert figures[0][:2] == figures[1][:2]
    assert all(torch.equal(*pair) for pair in zip(figures[0][2], figures[1][2], strict=True))
