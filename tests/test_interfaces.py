"""Every way in which anomalib reaches the two models, on ten small pictures."""

from __future__ import annotations

import inspect
import logging
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import pandas as pd
import pytest
import torch
import yaml
from anomalib.cli.cli import AnomalibCLI
from anomalib.data import Folder
from anomalib.deploy import TorchInferencer
from anomalib.engine import Engine
from anomalib.models import ALLOWED_MODULES, AnomalibModule, UnknownModelError, get_model, list_models
from PIL import Image
from safetensors.torch import save_file

import kd_multiresolution
from kd_multiresolution import KdMultiresolution, KdMultiresolutionDual
from kd_multiresolution.source.network import Source

SIZE = 32
SETTINGS = {"source": "efficientnet_lite0", "pretrained": False, "image_size": SIZE}
SOURCE_LINE = "efficientnet_lite0 with weights random, critical points blocks.1, blocks.2, blocks.4, blocks.6"
DUAL_SOURCE_LINE = "efficientnet_lite0 with weights random, critical points blocks.1, blocks.2, blocks.4"
BOTH = (KdMultiresolution, KdMultiresolutionDual)
NAMES = {
    "kd_multiresolution": KdMultiresolution,
    "KdMultiresolution": KdMultiresolution,
    "kd_multiresolution.KdMultiresolution": KdMultiresolution,
    "kd_multiresolution_dual": KdMultiresolutionDual,
    "KdMultiresolutionDual": KdMultiresolutionDual,
    "kd_multiresolution.KdMultiresolutionDual": KdMultiresolutionDual,
}
TRAINER = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


@dataclass(frozen=True)
class Training:
    """What ``anomalib train`` printed, and where it wrote."""

    output: str
    folder: Path

    @property
    def checkpoint(self) -> Path:
        return self.folder / "weights" / "lightning" / "model.ckpt"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noisy stripes, some with a bright patch and its mask; larger than the model's pictures, and not square."""
    root = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for folder, count in (("train/good", 4), ("test/good", 3), ("test/bad", 3)):
        (root / folder).mkdir(parents=True)
        for number in range(count):
            stripes = 90 + 60 * np.sin(np.arange(48) / 3)[None, :, None]
            picture = stripes + generator.normal(0, 5, (40, 48, 3))
            mask = np.zeros((40, 48), np.uint8)
            if folder == "test/bad":
                mask[10:24, 8 * number : 8 * number + 14] = 255
                picture[mask > 0] += 100
                (root / "masks").mkdir(exist_ok=True)
                Image.fromarray(mask).save(root / "masks" / f"{number}.png")
            Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(root / folder / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def training(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """``anomalib train --model kd_multiresolution`` as a user starts it, with pictures."""
    results = tmp_path_factory.mktemp("train")
    arguments = ["train", *model_arguments(), *data_arguments(pictures), *trainer_arguments(results)]
    output = run_anomalib(*arguments, "--trainer.max_epochs", "2", cwd=results)
    return Training(output, results / "KdMultiresolution" / "stripes" / "latest")


def folder_settings(root: Path) -> dict[str, str | int]:
    return {
        "name": "stripes",
        "root": str(root),
        "normal_dir": "train/good",
        "normal_test_dir": "test/good",
        "abnormal_dir": "test/bad",
        "mask_dir": "masks",
        "num_workers": 0,
        "val_split_mode": "same_as_test",
    }


def folder_data(root: Path) -> Folder:
    return Folder(**folder_settings(root))


def model_arguments(name: str = "kd_multiresolution") -> list[str]:
    options = (f"--model.{key}={str(value).lower()}" for key, value in SETTINGS.items())
    return ["--model", name, *options]


def data_arguments(root: Path) -> list[str]:
    return ["--data", "Folder", *(f"--data.{key}={value}" for key, value in folder_settings(root).items())]


def trainer_arguments(results: Path) -> list[str]:
    trainer = (f"--trainer.{key}={str(value).lower()}" for key, value in TRAINER.items())
    return ["--default_root_dir", str(results), *trainer]


def run_anomalib(*arguments: str, cwd: Path) -> str:
    """Run the ``anomalib`` executable of this environment and return all that it printed."""
    command = [str(Path(sys.executable).with_name("anomalib")), *arguments]
    done = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    return done.stdout


def heat_map_folder(output: str, source: str = SOURCE_LINE) -> Path:
    """Return the folder in the line ``Heat maps: ...``; the source stands behind it."""
    line = re.search(r"Heat maps: (\S+) \(source: (.*)\)$", output, re.MULTILINE)
    assert line, output
    assert line[2] == source
    return Path(line[1])


def assert_readable_heat_maps(folder: Path, count: int) -> None:
    files = sorted(folder.rglob("*.png"))
    assert len(files) == count
    for file in files:
        with Image.open(file) as image:
            pixels = np.asarray(image.convert("RGB"))
        assert min(pixels.shape[:2]) >= SIZE
        assert pixels.std() > 10


def assert_same_weights(model: torch.nn.Module, expected: dict[str, torch.Tensor]) -> None:
    weights = {key: value for key, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    assert weights.keys() == {key for key, value in expected.items() if isinstance(value, torch.Tensor)}
    assert all(torch.equal(value, expected[key]) for key, value in weights.items())


# The command line


def test_train_writes_checkpoint_metrics_and_heat_maps(training: Training) -> None:
    assert training.checkpoint.is_file()
    assert f"{SOURCE_LINE}." in training.output
    assert all(metric in training.output for metric in ("image_AUROC", "pixel_AUROC"))
    folder = heat_map_folder(training.output)
    assert folder.resolve() == (training.folder / "images").resolve()
    assert_readable_heat_maps(folder, count=6)


@pytest.mark.slow
def test_train_takes_the_dual_model_by_its_name(
    pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = [*model_arguments("kd_multiresolution_dual"), *data_arguments(pictures), *trainer_arguments(tmp_path)]
    with caplog.at_level(logging.INFO, logger="kd_multiresolution"):
        AnomalibCLI(args=["train", *arguments, "--trainer.max_epochs=2"])
    folder = tmp_path / "KdMultiresolutionDual" / "stripes" / "latest"
    checkpoint = folder / "weights" / "lightning" / "model.ckpt"
    heat_maps = heat_map_folder("\n".join(caplog.messages), DUAL_SOURCE_LINE)
    assert heat_maps.resolve() == (folder / "images").resolve()
    assert_readable_heat_maps(heat_maps, count=6)
    (file,) = folder.rglob("config.yaml")
    again = AnomalibCLI(args=["test", "--config", str(file), f"--ckpt_path={checkpoint}"], run=False)
    assert type(again.model) is KdMultiresolutionDual
    assert dict(again.model.hparams) == dict(KdMultiresolutionDual(**SETTINGS).hparams)
    alias = kd_multiresolution.kd_multiresolution_dual.load_from_checkpoint(checkpoint)
    model = KdMultiresolutionDual.load_from_checkpoint(checkpoint)
    assert type(alias) is type(model) is KdMultiresolutionDual
    assert_same_weights(alias, model.state_dict())
    assert model.post_processor.image_threshold.isfinite(), "told from normal images"


def test_saved_configuration_makes_the_same_model(training: Training) -> None:
    (file,) = training.folder.rglob("config.yaml")
    cli = AnomalibCLI(args=["train", "--config", str(file)], run=False)
    assert type(cli.model) is KdMultiresolution
    assert dict(cli.model.hparams) == dict(KdMultiresolution(**SETTINGS).hparams)


@pytest.mark.slow
def test_predict_writes_heat_maps(training: Training, pictures: Path, tmp_path: Path) -> None:
    arguments = [*model_arguments("KdMultiresolution"), "--ckpt_path", str(training.checkpoint)]
    data = ["--data", str(pictures / "test" / "bad")]
    output = run_anomalib("predict", *arguments, *data, *trainer_arguments(tmp_path), cwd=tmp_path)
    assert_readable_heat_maps(heat_map_folder(output), count=3)


def test_fit_writes_a_checkpoint(pictures: Path, tmp_path: Path) -> None:
    arguments = [*model_arguments(), *data_arguments(pictures), *trainer_arguments(tmp_path)]
    AnomalibCLI(args=["fit", *arguments, "--trainer.max_epochs=1"])
    assert len(list(tmp_path.rglob("v0/weights/lightning/model.ckpt"))) == 1


def test_validate_finds_the_threshold(training: Training, pictures: Path, tmp_path: Path) -> None:
    arguments = [*model_arguments(), *data_arguments(pictures), *trainer_arguments(tmp_path)]
    cli = AnomalibCLI(args=["validate", *arguments, "--ckpt_path", str(training.checkpoint)])
    trained = KdMultiresolution.load_from_checkpoint(training.checkpoint)
    assert cli.model.post_processor.image_threshold.isfinite()
    torch.testing.assert_close(cli.model.post_processor.image_threshold, trained.post_processor.image_threshold)


def test_test_repeats_the_metrics_of_train(training: Training, pictures: Path, tmp_path: Path) -> None:
    arguments = [*model_arguments(), *data_arguments(pictures), *trainer_arguments(tmp_path)]
    cli = AnomalibCLI(args=["test", *arguments, "--ckpt_path", str(training.checkpoint), "--model.visualizer=false"])
    metrics = {key: value.item() for key, value in cli.engine.trainer.callback_metrics.items()}
    assert {"image_AUROC", "image_F1Score", "pixel_AUROC", "pixel_F1Score"} <= metrics.keys()
    for name in ("image_AUROC", "pixel_AUROC"):
        printed = re.search(rf"{name}\W+([\d.]+)", training.output)
        assert printed, training.output
        assert metrics[name] == pytest.approx(float(printed[1]), abs=1e-6)


@pytest.fixture(scope="module")
def exported(training: Training, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``anomalib export`` to a torch file."""
    folder = tmp_path_factory.mktemp("export")
    arguments = ["--ckpt_path", str(training.checkpoint), "--export_type=torch", "--export_root", str(folder)]
    AnomalibCLI(args=["export", *model_arguments(), *trainer_arguments(folder), *arguments])
    return folder / "weights" / "torch" / "model.pt"


@pytest.mark.slow
def test_inferencer_on_the_export_equals_engine(
    training: Training, exported: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = KdMultiresolution.load_from_checkpoint(training.checkpoint, visualizer=False)
    engine = Engine(**TRAINER, default_root_dir=tmp_path)
    batches = engine.predict(model, data_path=pictures / "test")
    items = [item for batch in batches for item in batch]
    assert len(items) == 6

    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    inferencer = TorchInferencer(exported, device="cpu")
    for item in items:
        predicted = inferencer.predict(item.image_path)
        outputs = (predicted.pred_score, predicted.pred_label, predicted.anomaly_map, predicted.pred_mask)
        assert not any(output.requires_grad for output in outputs)
        torch.testing.assert_close(predicted.pred_score.squeeze(), item.pred_score.squeeze(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(predicted.anomaly_map.squeeze(), item.anomaly_map.squeeze(), rtol=1e-4, atol=1e-6)
        assert predicted.pred_label.item() == item.pred_label.item()


@pytest.mark.slow
def test_command_line_exports_the_gradient_map_to_onnx(pictures: Path, tmp_path: Path) -> None:
    # One level: torch's exporter takes minutes for the gradient through all of this source.
    network = KdMultiresolution(**SETTINGS, critical_points=["blocks.1"], epochs=1, visualizer=False)
    engine = Engine(**TRAINER, default_root_dir=tmp_path)
    engine.fit(network, datamodule=folder_data(pictures))
    checkpoint = str(engine.best_model_path)
    arguments = ["--ckpt_path", checkpoint, "--export_type=onnx", "--export_root", str(tmp_path)]
    AnomalibCLI(args=["export", *model_arguments(), *trainer_arguments(tmp_path), *arguments])
    session = onnxruntime.InferenceSession(str(tmp_path / "weights" / "onnx" / "model.onnx"))
    model = KdMultiresolution.load_from_checkpoint(checkpoint, visualizer=False)
    with Image.open(pictures / "test" / "bad" / "0.png") as picture:
        image = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255
    score, _, anomaly_map, _ = session.run(None, {"input": image.numpy()})
    with torch.no_grad():
        expected = model.eval()(image)
    np.testing.assert_allclose(score, expected.pred_score, rtol=0, atol=1e-5)
    np.testing.assert_allclose(anomaly_map, expected.anomaly_map, rtol=0, atol=1e-3)


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "train", "predict", "export"])
@pytest.mark.parametrize("name", NAMES)
def test_every_verb_takes_every_name(verb: str, name: str, pictures: Path) -> None:
    data = ["--data", str(pictures)] if verb == "predict" else []
    export = ["--export_type=torch", "--ckpt_path=model.ckpt"] if verb == "export" else []
    cli = AnomalibCLI(args=[verb, *model_arguments(name), *data, *export], run=False)
    assert type(cli.model) is NAMES[name]
    assert cli.model.name == NAMES[name].__name__
    assert cli.model.model.source.name == "efficientnet_lite0"


@pytest.mark.slow
def test_benchmark_gives_both_names_of_a_model_the_same_result(pictures: Path, tmp_path: Path) -> None:
    names = [name for name in NAMES if name.startswith("kd_multiresolution")]
    assert len(names) == 4
    config = {
        "accelerator": ["cpu"],
        "benchmark": {
            "seed": 3,
            "model": {
                "class_path": {"grid": names},
                "init_args": {**SETTINGS, "epochs": 1, "visualizer": False},
            },
            "data": {"class_path": "Folder", "init_args": folder_settings(pictures)},
        },
    }
    (tmp_path / "benchmark.yaml").write_text(yaml.safe_dump(config))
    run_anomalib("benchmark", "--config", "benchmark.yaml", cwd=tmp_path)
    (file,) = tmp_path.glob("runs/benchmark/*/results.csv")
    table = pd.read_csv(file)
    assert table["model.class_path"].tolist() == names
    # The cloner's weights have a seed of their own: anomalib seeds a job after it has built its model.
    for metric in ("image_AUROC", "pixel_AUROC"):
        assert table[metric].between(0, 1).all()
        assert table[metric].groupby([NAMES[name].__name__ for name in names]).nunique().tolist() == [1, 1]


@pytest.mark.parametrize("name", ["kd_multiresolution", "kd_multiresolution_dual"])
def test_help_explains_every_argument(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        AnomalibCLI(args=["train", "--model.help", name])
    text = " ".join(capsys.readouterr().out.split())
    parameters = inspect.signature(NAMES[name]).parameters
    assert set(re.findall(r"--model\.(\w+)", text)) == {*parameters, "help"}
    for argument in parameters:
        # "--model.sigma SIGMA explanation (type: float, default: 4.0)"; from Python 3.13 on the first of two names has
        # no SIGMA.
        names = rf"--model\.{argument}(?:(?: \S+)?, --model\.{argument}\+)?"
        option = rf"{names} (?:{argument.upper()}|\{{[\w,]+\}}) (?P<explanation>[^(-].*?)"
        found = re.search(option + r" \(type: ", text)
        assert found, f"no explanation of {argument}"
        assert len(found["explanation"].split()) >= 2


# From Python


@pytest.mark.parametrize("name", [name for name in NAMES if "." not in name])
def test_get_model_by_name(name: str) -> None:
    assert type(get_model(name, **SETTINGS)) is NAMES[name]


ALIASES = {
    "anomalib.models.KdMultiresolution": KdMultiresolution,
    "kd_multiresolution.kd_multiresolution": KdMultiresolution,
    "anomalib.models.KdMultiresolutionDual": KdMultiresolutionDual,
    "kd_multiresolution.kd_multiresolution_dual": KdMultiresolutionDual,
}


@pytest.mark.parametrize(("name", "model_class"), {**NAMES, **ALIASES}.items())
def test_get_model_by_class_path(name: str, model_class: type[AnomalibModule]) -> None:
    model = get_model({"class_path": name, "init_args": {**SETTINGS, "sigma": 2.0}})
    assert type(model) is model_class
    assert model.hparams["sigma"] == 2.0


@pytest.mark.parametrize("model_class", BOTH)
def test_get_model_refuses_other_modules_as_before(model_class: type[AnomalibModule]) -> None:
    with pytest.raises(UnknownModelError):
        get_model({"class_path": f"{model_class.__module__}.{model_class.__name__}"})
    assert "kd_multiresolution" in ALLOWED_MODULES
    assert all(module.startswith("anomalib.models") for module in ALLOWED_MODULES - {"kd_multiresolution"})


@pytest.mark.parametrize(
    ("case", "names"),
    [
        ("snake", {"kd_multiresolution", "kd_multiresolution_dual"}),
        ("pascal", {"KdMultiresolution", "KdMultiresolutionDual"}),
        ("title", {"Kd Multiresolution", "Kd Multiresolution Dual"}),
    ],
)
def test_list_models_names_each_once(case: str, names: set[str]) -> None:
    found = [model for model in list_models(case) if "multires" in model.lower()]
    assert len(found) == 2
    assert set(found) == names


def test_models_do_not_multiply_in_the_registry() -> None:
    ours = [model for model in AnomalibModule.__subclasses__() if model.__module__.startswith("kd_multiresolution")]
    assert len(ours) == 2
    assert set(ours) == set(BOTH)


@pytest.mark.parametrize(
    ("model_class", "source_line"), [(KdMultiresolution, SOURCE_LINE), (KdMultiresolutionDual, DUAL_SOURCE_LINE)]
)
def test_engine_fits_tests_and_predicts(
    model_class: type[AnomalibModule],
    source_line: str,
    pictures: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = model_class(**SETTINGS, epochs=1, visualizer=False)
    engine = Engine(**TRAINER, default_root_dir=tmp_path)
    with caplog.at_level(logging.INFO, logger="kd_multiresolution"):
        engine.fit(model, datamodule=folder_data(pictures))
        (metrics,) = engine.test(model, datamodule=folder_data(pictures))
    assert {"image_AUROC", "pixel_AUROC"} <= metrics.keys()
    assert f"{source_line}." in caplog.messages
    assert not any("Heat maps" in message for message in caplog.messages)  # no visualizer, no folder
    batches = engine.predict(model, data_path=pictures / "test" / "bad")
    assert sum(len(batch.pred_score) for batch in batches) == 3
    assert all(batch.anomaly_map.shape[-2:] == (SIZE, SIZE) for batch in batches)


def gone(*_: object, **__: object) -> None:
    msg = "the source's weights are gone"
    raise ConnectionError(msg)


@pytest.mark.parametrize("given", ["pretrained", "source_weights"])
@pytest.mark.parametrize("model_class", BOTH)
def test_checkpoint_brings_the_weights_of_the_source(
    model_class: type[AnomalibModule], given: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "source.safetensors"
    expected = Source("small_vgg", pretrained=given == "pretrained", seed=11).stages.state_dict()
    save_file(expected, file)
    settings: dict[str, object] = {"source": "small_vgg", "pretrained": given == "pretrained"}
    if given == "source_weights":
        settings["source_weights"] = str(file)
    model = model_class(**{**SETTINGS, **settings}, epochs=1, visualizer=False)
    engine = Engine(**TRAINER, default_root_dir=tmp_path)
    engine.fit(model, datamodule=folder_data(pictures))

    file.unlink()
    monkeypatch.setattr("timm.models._builder.load_pretrained", gone)
    loaded = model_class.load_from_checkpoint(engine.best_model_path)
    assert_same_weights(loaded, model.state_dict())
    stages = loaded.model.source.stages
    kept = {name: weight for name, weight in expected.items() if name in stages.state_dict()}
    assert len(kept) == len(expected) or model_class is KdMultiresolutionDual, "it ends at its last critical point"
    assert_same_weights(stages, kept)
    # The hyperparameters still say where they came from, and a new model wants them.
    assert {key: loaded.hparams[key] for key in settings} == settings
    with pytest.raises((ValueError, RuntimeError, FileNotFoundError), match="source"):
        model_class(**{**SETTINGS, **settings})


def test_anomalib_loads_checkpoints_of_both_names(training: Training) -> None:
    alias = kd_multiresolution.kd_multiresolution.load_from_checkpoint(training.checkpoint)
    model = KdMultiresolution.load_from_checkpoint(training.checkpoint)
    assert type(alias) is type(model) is KdMultiresolution
    assert_same_weights(alias, model.state_dict())
