"""Checkpoints say what they are, hold all that is needed, and run no code when they are loaded."""

from __future__ import annotations

import pickle
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.models import Padim
from torchvision.utils import save_image

from kd_multiresolution import KdMultiresolution, __version__
from kd_multiresolution.plugin.checkpoint import ARGUMENTS, FORMATS, KEY, OLDEST_DUAL_FORMAT
from kd_multiresolution.source.network import Source

SETTINGS: dict[str, Any] = {"source": "light_vgg", "image_size": 32, "epochs": 1, "visualizer": False}
VARIANTS = ("paper", "dual")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    for folder, count in (("good", 6), ("bad", 2)):
        (root / folder).mkdir()
        for i in range(count):
            save_image(torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(i)), root / folder / f"{i}.png")
    return root


def data(pictures: Path) -> Folder:
    return Folder(
        "parts", root=pictures, normal_dir="good", abnormal_dir="bad", normal_test_dir="bad", num_workers=0,
        train_batch_size=3, val_split_mode="same_as_test",
    )  # fmt: skip


def engine(folder: Path) -> Engine:
    settings = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return Engine(default_root_dir=folder, **settings)


@pytest.fixture(scope="module")
def checkpoints(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of each variant, and one of PaDiM."""
    networks = {variant: KdMultiresolution(variant=variant, **SETTINGS) for variant in VARIANTS}
    networks["padim"] = Padim(
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
    """A checkpoint of the paper's variant with another entry about itself."""

    def change(entry: dict[str, Any] | None) -> Path:
        checkpoint = torch.load(checkpoints["paper"], weights_only=True)
        checkpoint[KEY] = {**checkpoint[KEY], **entry} if entry is not None else None
        torch.save(checkpoint, tmp_path / "changed.ckpt")
        return tmp_path / "changed.ckpt"

    return change


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_checkpoint_says_what_the_model_was_built_with(variant: str, checkpoints: dict[str, Path]) -> None:
    entry = torch.load(checkpoints[variant], weights_only=True)[KEY]
    assert (entry["format"], entry["version"]) == (FORMATS[variant], __version__)
    points = {"paper": ["pool2", "pool3", "pool4", "pool5"], "dual": ["pool2", "pool3", "pool4"]}[variant]
    assert entry["built"]["critical_points"] == points
    assert entry["built"].keys() == {*ARGUMENTS, "critical_points"}


@pytest.mark.parametrize(
    ("trained", "given", "message"),
    [
        ("paper", {"source": "resnet18", "pretrained": False}, "trained with source='light_vgg', .*source='resnet18'"),
        ("paper", {"critical_points": ["pool3", "pool4"]}, r"critical_points=\['pool2', .*built with .*\['pool3', "),
        ("paper", {"cloner": "equal"}, "trained with cloner='compact'; .* cloner='equal'"),
        ("paper", {"cloner_bias": True}, "cloner_bias=False"),
        ("paper", {"cloner_batch_norm": False}, "cloner_batch_norm=True"),
        ("paper", {"variant": "dual"}, "variant='paper'"),
        ("dual", {"variant": "paper"}, "variant='dual'"),
        ("dual", {"variant": "dual", "critical_points": ["pool3", "pool4"]}, r"critical_points=\['pool2'"),
        ("padim", {}, "not a checkpoint of KdMultiresolution"),
        ("padim", {"variant": "dual"}, "not a checkpoint of KdMultiresolution"),
    ],
)
def test_another_models_checkpoint_is_refused(
    trained: str, given: dict[str, Any], message: str, checkpoints: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    network = KdMultiresolution(**{**SETTINGS, **given})
    with pytest.raises(ValueError, match=message):
        engine(tmp_path).test(network, datamodule=data(pictures), ckpt_path=checkpoints[trained])
    if trained == "paper" and "pretrained" not in given:
        with pytest.raises(ValueError, match=message):
            KdMultiresolution.load_from_checkpoint(checkpoints[trained], **given)


def test_a_newer_versions_checkpoint_is_refused(changed: Callable[..., Path]) -> None:
    with pytest.raises(ValueError, match=r"a later state of kd_multiresolution \(9.1\).* cannot read it"):
        KdMultiresolution.load_from_checkpoint(changed({"format": FORMATS["paper"] + 1, "version": "9.1"}))


def test_a_dual_checkpoint_of_other_layers_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = torch.load(checkpoints["dual"], weights_only=True)
    checkpoint[KEY]["format"] = OLDEST_DUAL_FORMAT - 1
    torch.save(checkpoint, tmp_path / "old.ckpt")
    with pytest.raises(ValueError, match=r"earlier state .* train it again"):
        KdMultiresolution.load_from_checkpoint(tmp_path / "old.ckpt")


def test_what_does_not_decide_shapes_may_differ(
    checkpoints: dict[str, Path],
    changed: Callable[..., Path],
    pictures: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    same = KdMultiresolution(**SETTINGS)
    engine(tmp_path).test(same, datamodule=data(pictures), ckpt_path=checkpoints["paper"])
    assert "thresholds" not in caplog.text
    assert "not heeded" not in caplog.text
    network = KdMultiresolution(
        **{**SETTINGS, "image_size": 64}, anomaly_map="discrepancy", score_points=["pool5"], seed=3,
        critical_points=["pool5", "pool4", "pool3", "pool2"],
    )  # fmt: skip
    engine(tmp_path).test(network, datamodule=data(pictures), ckpt_path=checkpoints["paper"])
    assert "image_size=[64, 64]: not heeded, images are prepared as in the checkpoint's training" in caplog.text
    assert network.pre_processor.transform.transforms[0].size == [SETTINGS["image_size"]] * 2
    fitted, given = "score_points=['pool3', 'pool4', 'pool5'], anomaly_map='gradient'", "['pool5'], anomaly_map='disc"
    assert re.search(f"were fitted with {re.escape(fitted)}, the model has .*{re.escape(given)}", caplog.text)
    assert KdMultiresolution.load_from_checkpoint(changed(None)), "of a version that wrote no entry"


def test_what_a_dual_training_found_stays(checkpoints: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    same = KdMultiresolution.load_from_checkpoint(checkpoints["dual"])
    assert not caplog.messages
    other = KdMultiresolution.load_from_checkpoint(checkpoints["dual"], image_score="whole", false_alarm_rate=0.3)
    assert caplog.messages[-1].startswith("image_score='whole', false_alarm_rate=0.3: not heeded, images are judged as")
    assert other.model.judged_as_whole == same.model.judged_as_whole
    assert other.post_processor.image_threshold == same.post_processor.image_threshold
    KdMultiresolution.load_from_checkpoint(checkpoints["dual"], sigma=2.0)
    assert re.search(r"fitted with sigma=4.0, the model has sigma=2.0: .* trained anew", caplog.messages[-1])


def test_train_says_that_it_tests_the_old_checkpoint(
    pictures: Path, checkpoints: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    network = KdMultiresolution(**{**SETTINGS, "epochs": 3})
    engine(tmp_path).train(network, datamodule=data(pictures), ckpt_path=checkpoints["paper"])
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
    checkpoint = torch.load(checkpoints["paper"], weights_only=True)
    for file, content in (("model.ckpt", checkpoint), ("source.pth", checkpoint["state_dict"])):
        torch.save({**content, "more": Malicious(tmp_path / "touched")}, tmp_path / file)
    with pytest.raises(ValueError, match=r"source_weights='.*source.pth': not a readable"):
        Source("light_vgg", weights=tmp_path / "source.pth")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        KdMultiresolution.load_from_checkpoint(tmp_path / "model.ckpt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        engine(tmp_path).test(
            KdMultiresolution(**SETTINGS), datamodule=data(pictures), ckpt_path=tmp_path / "model.ckpt"
        )
    assert not (tmp_path / "touched").exists()
    torch.load(tmp_path / "model.ckpt", weights_only=False)
    assert (tmp_path / "touched").exists(), "the file does what the test is about"


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_is_asked_of_the_network(
    variant: str, pictures: Path, checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_: Any) -> None:
        msg = "a connection was asked for"
        raise AssertionError(msg)

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    points = ["layer1", "layer2"]
    network = KdMultiresolution(
        **{**SETTINGS, "source": "resnet18"}, pretrained=False, critical_points=points, variant=variant
    )
    runner = engine(tmp_path)
    runner.fit(network, datamodule=data(pictures))
    runner.test(network, datamodule=data(pictures))
    runner.predict(KdMultiresolution.load_from_checkpoint(checkpoints[variant]), data_path=pictures / "bad")


@pytest.mark.parametrize("variant", VARIANTS)
def test_same_seed_same_figures_to_the_bit(variant: str, pictures: Path, tmp_path: Path) -> None:
    figures = []
    for run in ("first", "second"):
        torch.manual_seed(len(run))  # of what came before nothing may be left
        network = KdMultiresolution(variant=variant, **{**SETTINGS, "epochs": 2})
        runner = engine(tmp_path / run)
        runner.fit(network, datamodule=data(pictures))
        metrics = runner.test(network, datamodule=data(pictures), verbose=False)
        batches = runner.predict(network, datamodule=data(pictures))
        scores = [batch.pred_score for batch in batches] + [batch.anomaly_map for batch in batches]
        figures.append((metrics, float(runner.trainer.callback_metrics.get("train_loss", 0)), scores))
    assert figures[0][:2] == figures[1][:2]
    assert all(torch.equal(*pair) for pair in zip(figures[0][2], figures[1][2], strict=True))
