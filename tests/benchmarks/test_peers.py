"""The comparison with anomalib's models, on small pictures and a random ResNet-18."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import timm
import torch
from anomalib import PrecisionType
from anomalib.models import Patchcore
from safetensors.torch import load_file, save_file
from torchvision.transforms.v2 import Resize

import peers
from comparison import hub_cache
from comparison.candidates import CANDIDATES, LABELS
from comparison.experiment import data_of, run
from comparison.inference import measure
from comparison.rendering import trials_table
from comparison.trial import Trial
from kd_multiresolution import KdMultiresolution
from kd_multiresolution.data.texture_defects import ensure_written
from kd_multiresolution.source.network import Source
from runtimes import inference_table

pytestmark = pytest.mark.slow

LAYERS = ("layer1", "layer2", "layer3")
TRIAL = Trial(
    model="padim", category="bottle", seed=0, image_size=64, train_limit=8, epochs=1, batch_size=4, backbone="resnet18",
    layers=LAYERS, coreset_ratio=0.1, weights_sha256=None, curve=None, threads=1, imagenette=None,
)  # fmt: skip


@pytest.fixture(scope="module")
def mvtec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``bottle`` in MVTec AD's layout: the bricks of the demo."""
    root = tmp_path_factory.mktemp("mvtec")
    (root / "bottle").symlink_to(ensure_written(root / "textures", "brick", 0))
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet-18 without what lies behind the last level."""
    torch.manual_seed(5)
    state = timm.create_model("resnet18", pretrained=False).state_dict()
    file = tmp_path_factory.mktemp("weights") / "resnet18.safetensors"
    save_file({name: t for name, t in state.items() if not name.startswith(("layer4", "fc"))}, file)
    return file


@pytest.fixture
def cached(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What :func:`hub_cache.use` does for new processes, in this one."""
    hub_cache.fill(tmp_path / "hub", "resnet18", LAYERS, weights)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_trials_that_are_kept_have_the_names_that_are_looked_for() -> None:
    kept = [*(Path(peers.__file__).parent / "results" / "peers" / "trials").glob("*.json")]
    assert kept
    for file in kept:
        fields = json.loads(file.read_text())["trial"]
        assert Trial(**{**fields, "layers": tuple(fields["layers"])}).stem == file.stem


@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize("name", ["paper", "dual", "stfpm", "padim", "patchcore"])
def test_all_models_have_the_backbone_of_the_file(name: str, weights: Path) -> None:
    file = load_file(weights)
    model = CANDIDATES[name].build(replace(TRIAL, model=name))
    # STFPM's student has the same names.
    state = {key: tensor for key, tensor in model.state_dict().items() if "student" not in key}
    for expected in ("layer1.0.conv1.weight", "layer3.1.bn2.running_var"):
        (found,) = [key for key in state if key.endswith(f".{expected}")]
        assert torch.equal(state[found], file[expected])


def test_a_file_that_ends_too_early_is_refused(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"does not fit .*'resnet18'.*layer4"):
        hub_cache.fill(tmp_path, "resnet18", ("layer4",), weights)


def test_a_backbone_without_published_weights_is_refused(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"(not a model of timm|no pre-trained weights|does not fit)"):
        hub_cache.fill(tmp_path, "test_resnet", ("layer1",), weights)


def test_models_of_a_seed_train_on_the_same_images(mvtec: Path) -> None:
    def chosen(**changes: Any) -> list[str]:
        samples = data_of(replace(TRIAL, **changes), mvtec).train_data.samples
        assert (samples.label_index == 0).all()
        return samples.image_path.tolist()

    assert chosen() == chosen(model="stfpm", batch_size=16)
    assert len(chosen()) == 8
    assert chosen() != chosen(seed=1)
    assert len(chosen(train_limit=None)) > 8


@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize(
    ("name", "epochs", "interval", "points"), [("stfpm", 2, 1, [1, 2]), ("stfpm", 1, 2, [1]), ("dual", 2, 1, [1, 2])]
)
def test_a_trial_measures_every_epoch_asked_for_and_the_last_outside_its_time(
    mvtec: Path, tmp_path: Path, name: str, epochs: int, interval: int, points: list[int]
) -> None:
    trial = replace(TRIAL, model=name, epochs=epochs, curve=interval)
    result = run(trial, mvtec, tmp_path / "model.ckpt")
    assert [point["epochs"] for point in result["curve"]] == points
    seconds = [0, *(point["seconds"] for point in result["curve"])]
    assert sorted(set(seconds)) == seconds
    assert seconds[-1] <= result["fit_seconds"]
    # The last point and the test see the same model.
    for metric in ("image_AUROC", "pixel_AUROC", "AUPRO"):
        assert result["curve"][-1][metric] == pytest.approx(result["metrics"][metric], abs=1e-6)
    assert result["images"]["train"] == 8
    assert result["epochs"] == epochs
    assert result["checkpoint_mib"] == (tmp_path / "model.ckpt").stat().st_size / 2**20
    assert 0 < result["test_seconds"] < 100
    assert result["peak_mib"] > 100


def test_the_command_runs_resumes_and_shows_failures(
    mvtec: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cached: None
) -> None:
    monkeypatch.setattr(peers, "in_own_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(hub_cache, "use", lambda cache: None)
    arguments = [
        "--data", str(mvtec), "--weights", str(weights), "--output", str(tmp_path / "out"), "--image_size", "64",
        "--train_limit", "12", "--epochs", "paper=1", "--models", "paper", "padim", "efficient_ad",
        "--repetitions", "2", "--batches", "2", "--curve", "1",
    ]  # fmt: skip
    assert peers.main(arguments) == 0
    text = (tmp_path / "out" / "peers.md").read_text()
    assert "EfficientAD is left out" in text
    stored = json.loads((tmp_path / "out" / "peers.json").read_text())
    assert {result["trial"]["model"] for result in stored["trials"]} == {"paper", "padim"}
    (row,) = stored["inference"]["rows"]
    assert {*row["figures"]} == {"backbone", "paper", "padim"}
    assert row["figures"]["backbone"]["ratio"] == 1
    assert (tmp_path / "out" / "curve_bottle.png").stat().st_size > 10_000

    def no_time(*_: object) -> dict[str, Any]:
        msg = "no time"
        raise RuntimeError(msg)

    monkeypatch.setattr(peers.experiment, "run", no_time)
    assert peers.main([*arguments, "--repetitions", "0"]) == 0
    assert peers.main([*arguments, "--repetitions", "0", "--seeds", "0", "1"]) == 2
    text = (tmp_path / "out" / "peers.md").read_text()
    assert "| 1, failed: RuntimeError: no time |" in text
    next((tmp_path / "out" / "checkpoints").glob("*padim*")).unlink()
    assert peers.main(arguments) == 1, "what is to be timed and has no checkpoint is trained again"


@pytest.fixture(scope="module")
def vgg16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The convolutions of a VGG-16."""
    torch.manual_seed(6)
    state = timm.create_model("vgg16", pretrained=False, features_only=True).state_dict()
    file = tmp_path_factory.mktemp("weights") / "vgg16.safetensors"
    save_file({name.replace("features_", "features."): tensor for name, tensor in state.items()}, file)
    return file


def test_the_papers_source_comes_of_a_file_of_its_own(weights: Path, vgg16: Path, tmp_path: Path, cached: None) -> None:
    arguments = ["--data", ".", "--models", "padim", "published", "--weights", str(weights)]
    (padim,) = peers.planned(peers.parser().parse_args(arguments))
    assert padim.model == "padim"
    assert "published" not in peers.parser().parse_args(["--data", "."]).models, "it takes hours"
    both = peers.parser().parse_args([*arguments, "--vgg16_weights", str(vgg16)])
    shared, own = peers.planned(both)
    assert shared == padim
    assert own.weights_sha256 == hub_cache.sha256(vgg16)

    for backbone, layers, file in peers.weight_files(both)[1:]:
        hub_cache.fill(tmp_path / "hub", backbone, layers, file)
    model = CANDIDATES["published"].build(own)
    assert isinstance(model, KdMultiresolution)
    expected = Source("vgg16.tv_in1k", weights=vgg16, critical_points=own.layers).state_dict()
    assert all(torch.equal(tensor, model.model.source.state_dict()[name]) for name, tensor in expected.items())
    assert model.model.anomaly_map == "gradient"
    assert isinstance(model.pre_processor.transform, Resize), "as in the paper, and not normalised beyond it"


def test_what_has_no_file_is_left_out_and_said(weights: Path, tmp_path: Path) -> None:
    assert (
        peers.main(["--data", ".", "--models", "published", "--weights", str(weights), "--output", str(tmp_path)]) == 0
    )
    assert "source is left out: from files, it needs its own (`--vgg16_weights`)" in (tmp_path / "peers.md").read_text()


@pytest.mark.parametrize("others", [["padim"], ["paper", "stfpm"]])
def test_weights_come_of_files_for_all_models_or_for_none(others: list[str], vgg16: Path, tmp_path: Path) -> None:
    arguments = ["--data", ".", "--vgg16_weights", str(vgg16), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=f"downloaded for {', '.join(others)} either"):
        peers.main([*arguments, "--models", *others, "published"])
    assert not (tmp_path / "out").exists()


def test_table_has_mean_and_deviation_over_seeds() -> None:
    def result(auroc: float) -> dict[str, Any]:
        metrics = {"image_AUROC": auroc, "pixel_AUROC": 0.5, "AUPRO": 0.25}
        return {
            "metrics": metrics, "epochs": 1, "fit_seconds": 3, "test_seconds": 2, "peak_mib": 9, "checkpoint_mib": 5,
        }  # fmt: skip

    trials = [TRIAL, replace(TRIAL, seed=1), replace(TRIAL, model="dual")]
    table = trials_table(trials, {trials[0]: result(0.9), trials[1]: result(0.8)}, {trials[2]: "out of memory"})
    assert "| bottle | 8 | PaDiM | 1 | 85.0 ± 7.1 | 50.0 ± 0.0 | 25.0 ± 0.0 | 3 | 2 | 9 | 5 | 2 |" in table
    assert "| bottle | 8 | ours, dual | failed: out of memory |" in table


@pytest.mark.usefixtures("cached")
def test_a_model_that_does_not_take_a_batch_stops_nobody(
    mvtec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As Python 3.11.0 to 3.11.3 pickles PatchCore's precision: torch reads it from a trusted file alone.
    monkeypatch.setattr(PrecisionType, "__reduce_ex__", lambda value, _: (getattr, (PrecisionType, value.name)))
    trials = {name: replace(TRIAL, model=name) for name in ("padim", "patchcore")}
    files = {name: tmp_path / f"{name}.ckpt" for name in trials}
    for name, trial in trials.items():
        run(trial, mvtec, files[name])
    forward = Patchcore.forward

    def one_at_a_time(self: Patchcore, batch: torch.Tensor) -> object:
        if len(batch) > 1:
            msg = "one image\nat a time"
            raise ValueError(msg)
        return forward(self, batch)

    monkeypatch.setattr(Patchcore, "forward", one_at_a_time)
    found = measure(trials, files, ["torch"], [1, 2], 1)
    assert [{*row["figures"]} for row in found["rows"]] == [{"backbone", "padim", "patchcore"}, {"backbone", "padim"}]
    assert found["failures"] == {"torch, patchcore, batch 2": "ValueError: one image at a time"}
    table = inference_table(found, LABELS)
    assert re.search(r"\| torch \| PatchCore \| [\d., ]+ \|  \| [\d.]+ \(batch 1\) \|  \|", table), table
    assert "- torch, patchcore, batch 2: ValueError: one image at a time" in table


@pytest.mark.parametrize(
    ("epochs", "message"), [("padim=3", "padim sees each image once"), ("dual=0", "dual=0: expected 1 epoch or more")]
)
def test_epochs_that_a_model_cannot_have_are_refused(
    epochs: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        peers.main(["--data", ".", "--epochs", epochs])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "option",
    [
        ("--threads", "-3"),
        ("--curve", "0"),
        ("--train_limit", "0"),
        ("--repetitions", "-1"),
        ("--image_size", "0"),
        ("--seeds", "-1"),
        ("--coreset_ratio", "7"),
    ],
)
def test_numbers_that_cannot_be_are_refused(option: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        peers.main(["--data", ".", *option])
    assert f"{option[0]}: {option[1]}: expected" in capsys.readouterr().err


def test_weights_of_another_backbone_are_refused_in_words(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"does not fit source='resnet34'"):
        peers.main(["--data", ".", "--backbone", "resnet34", "--weights", str(weights), "--output", str(tmp_path)])


def test_a_file_of_weights_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"absent\.safetensors: this file of weights cannot be read \(No such file"):
        peers.main(
            ["--data", ".", "--weights", str(tmp_path / "absent.safetensors"), "--output", str(tmp_path / "out")]
        )
    assert not (tmp_path / "out").exists()


def test_a_command_with_nothing_to_run_writes_its_table(tmp_path: Path) -> None:
    assert peers.main(["--data", ".", "--models", "efficient_ad", "--output", str(tmp_path / "new")]) == 0
    assert "EfficientAD is left out" in (tmp_path / "new" / "peers.md").read_text()
