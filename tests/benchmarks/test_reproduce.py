"""The command that reproduces a table, on small pictures."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.cli.cli import AnomalibCLI
from PIL import Image
from sklearn.metrics import roc_auc_score

import reproduce
from kd_multiresolution import KdMultiresolution
from kd_multiresolution.data import BrainMRI
from kd_multiresolution.data.texture_defects import ensure_written
from kd_multiresolution.paper.torch_model import ANOMALY_MAPS, KdMultiresolutionModel
from reporting import in_a_line
from reproduction import experiment
from reproduction.experiment import ViewsAfterConvergence, fingerprint, pre_processor, state_file
from reproduction.results import Results
from reproduction.settings import MAPS, PAPER_MAPS, SCORES, Settings, View, attribution_view
from reproduction.tables import PLANS, reproduction

pytestmark = pytest.mark.slow

CONFIGS = Path(__file__).parents[2] / "configs"
BASE: dict[str, Any] = {
    "source": "small_vgg", "pretrained": True, "weights": None, "weights_sha256": "0", "batch_size": 64, "epochs": None,
    "critical_points": ("pool2", "pool3", "pool4", "pool5"), "evaluations": 5, "interval": 10, "limit": None,
    "model": "paper",
}  # fmt: skip


@pytest.fixture(scope="module")
def medical(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``brain_mri`` and ``head_ct`` of 14 normal and 3 anomalous images."""
    root = tmp_path_factory.mktemp("medical")
    generator = np.random.default_rng(0)
    for number in range(17):
        picture = Image.fromarray(generator.integers(0, 160 + 20 * (number // 14), (32, 32), dtype=np.uint8))
        for path in (
            root / "brain_mri" / ("no" if number < 14 else "yes") / f"{number}.png",
            root / "head_ct" / "head_ct" / f"{number:03d}.png",
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
    labels = "".join(f"{number}, {int(number >= 14)}\n" for number in range(17))
    (root / "head_ct" / "labels.csv").write_text("id, hemorrhage\n" + labels)
    return root


@pytest.fixture(scope="module")
def mvtec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``bottle`` in MVTec AD's layout: the bricks of the demo."""
    root = tmp_path_factory.mktemp("mvtec")
    (root / "bottle").symlink_to(ensure_written(root / "textures", "brick", 0))
    return root


def reproduce_table(number: int, root: Path, output: Path, *more: str) -> int:
    short = ["--image-size", "32", "--epochs", "1", "--source", "small_vgg"]
    return reproduce.main(["--table", str(number), "--root", str(root), "--output", str(output), *short, *more])


def test_a_table_is_written_and_nothing_done_twice(medical: Path, tmp_path: Path) -> None:
    assert reproduce_table(6, medical, tmp_path, "--splits", "0", "1") == 0
    files = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "trainings").iterdir()}
    assert len(files) == 6  # two splits of BrainMRI, HeadCT and HeadCT with augmentation
    text = (tmp_path / "table_6_32px.md").read_text()
    assert text.count("| head_ct | 7") == 1
    assert text.count("| head_ct | 8") == 1
    assert "0 of 2" in text  # after one epoch nothing has converged

    # A second call does what is new: a third split; a removed file is made again, the others stay.
    removed = next(name for name in files if name.startswith("brain_mri-seed0-split1"))
    (tmp_path / "trainings" / removed).unlink()
    assert reproduce_table(6, medical, tmp_path, "--dataset", "brain_mri", "--splits", "1", "2") == 0
    again = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "trainings").iterdir()}
    assert {name for name in again if again[name] != files.get(name)} == {
        removed,
        *(name for name in again if "brain_mri-seed0-split2" in name),
    }
    assert len(again) == 7


def test_a_result_says_what_it_was_made_with(medical: Path, tmp_path: Path) -> None:
    reproduce_table(6, medical, tmp_path, "--dataset", "brain_mri", "--seeds", "4")
    ((settings, result),) = Results(tmp_path / "trainings")
    assert (settings.dataset, settings.seed, settings.split, settings.source) == ("brain_mri", 4, 0, "small_vgg")
    assert len(settings.weights_sha256) == 64
    assert result["environment"]["packages"].keys() >= {"kd-multiresolution", "torch", "anomalib"}
    assert result["images"] == {"train": 4, "test": 13}
    assert (result["epochs"], result["evaluated_after"], result["converged_after"]) == (1, [1], None)
    assert result["metrics"].keys() == {"scores/image_AUROC", "scores/image_F1"}


def test_other_settings_are_another_result(medical: Path, tmp_path: Path) -> None:
    for batch in ("2", "4", "2"):
        reproduce_table(6, medical, tmp_path, "--dataset", "brain_mri", "--batch-size", batch)
    assert len(list(Results(tmp_path / "trainings"))) == 2


def test_an_interrupted_run_keeps_what_is_done(medical: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, started = reproduce.run, []

    def interrupted(settings: Settings, *arguments: Any) -> dict[str, Any]:
        started.append(settings)
        if len(started) == 2:
            raise KeyboardInterrupt
        return run(settings, *arguments)

    monkeypatch.setattr(reproduce, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reproduce_table(6, medical, tmp_path, "--dataset", "brain_mri", "--splits", "0", "1", "2")
    assert [settings.split for settings, _ in Results(tmp_path / "trainings")] == [0]
    reproduce_table(6, medical, tmp_path, "--dataset", "brain_mri", "--splits", "0", "1", "2")
    assert [settings.split for settings in started] == [0, 1, 1, 2]


def test_a_failed_training_is_named_and_the_others_go_on(medical: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "head_ct").symlink_to(medical / "head_ct")
    assert reproduce_table(6, tmp_path / "data", tmp_path) == 1
    text = (tmp_path / "table_6_32px.md").read_text()
    assert "| brain_mri | 95.01 ± 0.229 | – |" in text
    assert "brain_mri-seed0-split0 at pool2, pool3, pool4, pool5 failed: FileNotFoundError" in text
    assert len(list(Results(tmp_path / "trainings"))) == 2
    assert reproduce_table(6, medical, tmp_path) == 0, "what failed is tried again"


def test_views_of_a_map_share_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each view has what a model of its own would have, whatever the weights are by now; gradients are taken once."""
    trained = KdMultiresolution("small_vgg", visualizer=False, evaluator=False, post_processor=False)
    views = (*PLANS[4].views, SCORES, View("guided", "guided_backprop", sigma=0.0), View("discrepancy", "discrepancy"))
    views += (attribution_view("SmoothGrad"), View("smooth", "smooth_grad"))
    arguments: dict[str, Any] = {"source": "small_vgg"}
    evaluation = ViewsAfterConvergence(views, arguments, evaluations=1, interval=1)
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    taken, gradient = [], KdMultiresolutionModel._gradient
    monkeypatch.setattr(
        KdMultiresolutionModel, "_gradient", lambda self, *args: taken.append(self) or gradient(self, *args)
    )
    for _ in range(2):
        with torch.no_grad():
            for weight in trained.model.cloner.parameters():
                weight.mul_(1.1)
        taken.clear()
        read = {name: model.eval()(images) for name, model in evaluation.models(trained).items()}
        once = [model for model in taken if model.anomaly_map != "smooth_grad"]
        assert len(once) == len({*once}) == 2
        assert len({*taken}) == 4, "SmoothGrad of either kind"
        for view in views:
            own = KdMultiresolutionModel(
                **arguments,
                anomaly_map=view.anomaly_map,
                sigma=view.sigma,
                percentile_scale=view.percentile_scale,
                smooth_grad_as_published=view.as_published,
            ).eval()
            own.load_state_dict(trained.model.state_dict())
            expected, ours = own(images), read[f"{view.name}/"]
            torch.testing.assert_close(ours.pred_score, expected.pred_score, rtol=0, atol=0)
            assert (ours.anomaly_map is None) == (expected.anomaly_map is None) == (view == SCORES)
            if ours.anomaly_map is not None:
                torch.testing.assert_close(ours.anomaly_map, expected.anomaly_map, rtol=0, atol=0)


def test_attributions_are_read_from_one_training(mvtec: Path, tmp_path: Path) -> None:
    short = ["--classes", "bottle", "--limit", "6"]
    assert reproduce_table(11, mvtec, tmp_path, *short) == 0
    ((_, result),) = Results(tmp_path / "trainings")
    assert result["images"] == {"train": 6, "test": 12}
    metrics = {name: figure["mean"] for name, figure in result["metrics"].items()}
    blurred, plain = (metrics[f"{name}/pixel_AUROC_anomalous"] for name in ("Gradients + Gaussian", "Gradients"))
    assert blurred != plain
    assert len({figure for name, figure in metrics.items() if name.endswith("image_AUROC")}) == 1
    text = (tmp_path / "table_11_32px_limit6.md").read_text()
    assert f"| bottle | 96.32 | {100 * blurred:.2f} |" in text
    assert f"| bottle | 93.20 | {100 * plain:.2f} |" in text
    for method, name in (("SmoothGrad", "smooth_grad"), ("GBP", "guided_backprop")):
        assert (f"## {method}" in text) == (name in ANOMALY_MAPS)
        assert (f"{method}: not measured, the model offers no {name} map" in text) == (name not in ANOMALY_MAPS)

    # Table 1 has the means of the same columns; Table 7's last row asks for scores, which that training has as well.
    assert reproduce_table(1, mvtec, tmp_path, *short) == 0
    assert reproduce_table(7, mvtec, tmp_path, *short) == 0
    points = sorted(len(settings.critical_points) for settings, _ in Results(tmp_path / "trainings"))
    assert points == [1, 2, 4]


@pytest.mark.parametrize(
    ("dataset", "normal", "anomalous", "train"),
    [
        ("retinal_oct", "test/NORMAL", "test/DRUSEN", "train/NORMAL"),
        ("resc", "Retina_RESC/test/good/img", "Retina_RESC/test/Ungood/img", "Retina_RESC/train/good"),
    ],
)
def test_table_5_on_both_data_sets(tmp_path: Path, dataset: str, normal: str, anomalous: str, train: str) -> None:
    root = tmp_path / "data"
    # OCT2017 has two more kinds of anomalous images, RESC has masks and a validation set.
    others = {
        "retinal_oct": ["test/CNV", "test/DME"],
        "resc": [
            f"Retina_RESC/{f}"
            for f in ("test/Ungood/label", "valid/good/img", "valid/Ungood/img", "valid/Ungood/label")
        ],
    }
    for brightness, folder in enumerate((train, normal, anomalous, *others[dataset])):
        (root / folder).mkdir(parents=True)
        for number in range(2):
            picture = Image.fromarray(np.full((32, 32), 20 * brightness + number, np.uint8))
            picture.save(root / folder / (f"{number}.png" if dataset == "resc" else f"{brightness}{number}.jpeg"))
    assert reproduce_table(5, root, tmp_path, "--dataset", dataset) == 0
    ((settings, result),) = Results(tmp_path / "trainings")
    assert settings.dataset == dataset
    assert result["images"] == {"train": 2, "test": 4 if dataset == "resc" else 8}
    assert "| retinal_oct | 97.01 ± 0.426 |" in (tmp_path / f"table_5_{dataset}_32px.md").read_text()


def test_missing_weights_are_said_before_anything_starts(tmp_path: Path) -> None:
    absent = tmp_path / "vgg16.safetensors"
    with pytest.raises(SystemExit, match="no such file"):
        reproduce.main(["--table", "3", "--source-weights", str(absent), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_what_does_not_exist_is_refused(tmp_path: Path) -> None:
    for arguments, message in (
        (["--table", "3", "--dataset", "mnist"], "Table 3 takes mvtec"),
        (["--table", "3", "--classes", "cow"], "--classes of Table 3: .*'cow': .* 0 bottle, 1 hazelnut"),
        (["--table", "3", "--splits", "0", "1"], r"--splits=\[0, 1\]: only BrainMRI and HeadCT"),
        (["--table", "3", "--model", "dual", "--image-size", "16"], "needs images of at least 32 pixels"),
        (["--table", "9", "--model", "dual"], "--table=9: .* Tables 2, 3, 5, 6 can"),
        (["--table", "9", "--rows", "Dir Loss", "Direction"], "--rows='Direction': expected some of .*'Dir Loss'"),
        (["--table", "3", "9", "--rows", "Dir Loss"], "Table 3 has no such row"),
        (["--table", "7", "--critical-points", "pool4", "pool5", "--rows", "TheLast2"], "the last 2 are all"),
        (["--table", "6", "--rows", "OURS+AUG", "--classes", "brain_mri"], "no table has such a row of such a class"),
        (["--table", "3", "--score-points", "pool33"], "score_points=.*expected some of the critical_points"),
        (["--table", "3", "--score-points", "pool4", "pool4"], "name each critical point once"),
    ):
        with pytest.raises(SystemExit, match=message):
            reproduce.main([*arguments, "--source", "small_vgg", "--output", str(tmp_path)])


@pytest.mark.parametrize("argument", ["--output", "--checkpoints"])
def test_where_nothing_can_be_written_nothing_is_trained(argument: str, medical: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SystemExit, match=f"{argument}=.*file.*: nothing can be written there"):
        reproduce_table(6, medical, tmp_path / "results", argument, str(tmp_path / "file" / "folder"))
    assert not [*tmp_path.rglob("*.json")]


@pytest.mark.parametrize("number", PLANS)
def test_every_plan_covers_its_table(number: int) -> None:
    methods = set()
    for dataset in PLANS[number].datasets:
        table = reproduction(number, dataset, None, BASE)
        for case, columns in table.cells.items():
            assert table.published.row(case.method)
            assert set() < set(columns) <= set(table.published.columns)
        methods |= {case.method for case in table.cells} | set(table.missing)
    assert methods == {case.method for case in PLANS[number].cases}
    ablation = number in {1, 7, 8, 9, 10, 11}
    assert not ablation or methods == {row.method for row in table.published.rows}


def test_tables_of_one_call_share_trainings_and_views() -> None:
    tables = [reproduction(number, None, ["screw"], BASE) for number in (9, 4)]
    alone, both = (reproduce.trainings(some, {0: "0", 1: "0"}, [0]) for some in (tables[:1], tables))
    assert [training.training for training in both] == [training.training for training in alone]
    total = [training.views for training in both if (training.cloner, training.terms) == ("compact", "total")]
    assert total == [(MAPS, PAPER_MAPS)] * 2
    assert {training.views for training in both if training.cloner == "equal"} == {(SCORES,)}


def test_some_rows_alone_are_trained_and_read() -> None:
    def of(number: int, *rows: str) -> list[Settings]:
        return reproduce.trainings([reproduction(number, None, ["screw"], BASE, rows or None)], {0: "0"}, [0])

    scored = reproduction(7, None, ["screw"], {**BASE, "score_points": ("pool4", "pool5")})
    assert scored.missing == {"TheLast": "it has no pool4 to score"}
    assert [training.terms for training in of(9, "Dir Loss", "MSE Loss")] == ["direction", "value"]
    (blurred,) = of(11, "GBP + Gaussian", "Gradients + Gaussian")
    assert [view.name for view in blurred.views] == ["Gradients + Gaussian", "GBP + Gaussian"]
    (every,) = of(11)
    assert blurred.training == every.training
    assert set(blurred.views) < set(every.views)


def test_rows_measured_before_stay_in_the_table(mvtec: Path, tmp_path: Path) -> None:
    asked = ["--classes", "bottle", "--rows"]
    for rows, columns in ((["Gradients"], 1), (["GBP", "GBP + Gaussian"], 3)):
        assert reproduce_table(11, mvtec, tmp_path, *asked, *rows) == 0
        text = (tmp_path / "table_11_32px.md").read_text()
        assert text.count("| bottle |") == columns
        assert all(f"## {row}\n" in text for row in rows)


def test_every_column_has_its_first_split_before_the_second_begins() -> None:
    order = reproduce.trainings([reproduction(6, None, None, BASE)], {0: "0"}, [3, 4])
    assert [(training.dataset, training.augment, training.split) for training in order] == [
        (dataset, augment, split)
        for split in (3, 4)
        for dataset, augment in (("brain_mri", False), ("head_ct", False), ("head_ct", True))
    ]


def test_a_training_that_ends_at_its_limit_is_averaged_over_its_last_epochs(medical: Path, tmp_path: Path) -> None:
    options = ["--dataset", "brain_mri", "--epochs", "5", "--evaluations", "2", "--interval", "3"]
    assert reproduce_table(6, medical, tmp_path, *options, "--checkpoints", str(tmp_path / "kept")) == 0
    ((settings, result),) = Results(tmp_path / "trainings")
    assert (settings.interval, result["evaluated_after"], result["converged_after"]) == (3, [2, 5], None)
    text = (tmp_path / "table_6_32px.md").read_text()
    assert "2 late epochs, 3 apart" in text
    assert f"{100 * result['metrics']['scores/image_AUROC']['std']:.2f} (2)" in text
    assert "limited to 5 epochs" in text

    # The model that is kept is the one of the last evaluation.
    (checkpoint,) = (tmp_path / "kept").iterdir()
    network = KdMultiresolution.load_from_checkpoint(checkpoint, pretrained=False).eval()
    data = BrainMRI(root=medical / "brain_mri", split_seed=0, eval_batch_size=4, num_workers=0)
    data.setup()
    labels, scores = [], []
    for batch in data.test_dataloader():
        labels += batch.gt_label.tolist()
        scores += network.model(network.pre_processor(batch.image)).pred_score.tolist()
    assert roc_auc_score(labels, scores) == pytest.approx(result["metrics"]["scores/image_AUROC"]["values"][-1])


def test_an_interrupted_training_goes_on_from_its_last_state(
    medical: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--dataset", "brain_mri", "--epochs", "6", "--evaluations", "2", "--interval", "2", "--batch-size", "4"]
    step, steps = KdMultiresolution.training_step, []

    def interrupted(self: KdMultiresolution, batch: Any, index: int) -> Any:
        steps.append(self.current_epoch)
        if self.current_epoch == 5 and "first" in str(self.trainer.checkpoint_callback.dirpath):
            raise RuntimeError("the machine was wanted for something else")
        return step(self, batch, index)

    monkeypatch.setattr(KdMultiresolution, "training_step", interrupted)
    for folder, failures in (("first", 1), ("whole", 0)):
        kept = str(tmp_path / folder)
        assert reproduce_table(6, medical, tmp_path / folder, *options, "--checkpoints", kept) == failures
    ((_, whole),) = Results(tmp_path / "whole" / "trainings")
    (state,) = (tmp_path / "first").glob("*.ckpt")
    assert state.name.endswith(".unfinished.ckpt")

    moved = tmp_path / "moved"
    moved.mkdir()
    state.rename(moved / state.name)
    steps.clear()
    assert reproduce_table(6, medical, moved, *options, "--checkpoints", str(moved)) == 0
    assert steps == [4, 5]
    ((_, resumed),) = Results(moved / "trainings")
    assert [path.name for path in moved.glob("*.ckpt")] == [state.name.replace(".unfinished", "")]
    assert resumed["evaluated_after"] == [4, 6]
    assert resumed["metrics"] == whole["metrics"]
    assert resumed["resumed_after"] == 4
    assert "resumed_after" not in whole


def test_a_state_that_cannot_be_read_is_named(medical: Path, tmp_path: Path) -> None:
    options = ["--dataset", "brain_mri", "--checkpoints", str(tmp_path)]
    assert reproduce_table(6, medical, tmp_path, *options) == 0
    ((settings, _),) = Results(tmp_path / "trainings")
    shutil.rmtree(tmp_path / "trainings")
    state = state_file(settings, tmp_path)
    assert state == state_file(replace(settings, weights="renamed.safetensors"), tmp_path)
    state.write_bytes(b"PK half a file")
    assert reproduce_table(6, medical, tmp_path, *options) == 1
    text = (tmp_path / "table_6_32px.md").read_text()
    assert f"{state}: no state to go on from" in text
    assert "Move it away" in text


def test_the_dual_model_is_evaluated_at_the_end_of_its_cycle(medical: Path, tmp_path: Path) -> None:
    options = ["--dataset", "brain_mri", "--epochs", "2", "--batch-size", "4"]
    assert reproduce_table(6, medical, tmp_path, *options) == 0
    assert reproduce_table(6, medical, tmp_path, *options, "--model", "dual") == 0
    results = {settings.model: (settings, result) for settings, result in Results(tmp_path / "trainings")}
    settings, result = results["dual"]
    assert settings.critical_points == ("pool2", "pool3", "pool4"), "the model's own"
    assert result["evaluated_after"] == [2]
    assert len(results) == 2
    text = (tmp_path / "table_6_dual_32px.md").read_text()
    assert "the dual model" in text
    assert re.search(r"\| brain_mri \|.*\| 2 \| – \|", text), "it need not converge"
    assert "late epochs," not in text
    assert "after the last epoch" in text
    assert "the dual model" not in (tmp_path / "table_6_32px.md").read_text()


def test_what_was_asked_for_is_trained(medical: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning takes 1000 epochs for nothing said, and all GPUs that there are."""
    given = {}

    class TrainedError(Exception):
        pass

    class Spy:
        def __init__(self, **arguments: Any) -> None:
            given.update(arguments)

        def fit(self, model: KdMultiresolution, **_: Any) -> None:
            given["epochs"] = model.epochs
            raise TrainedError

    monkeypatch.setattr(experiment, "Engine", Spy)
    (cells, _) = reproduction(6, None, ["brain_mri"], {**BASE, "epochs": 1000}).cells.values()
    with pytest.raises(TrainedError):
        experiment.run(cells["brain_mri"], None, medical / "brain_mri")
    assert (given["max_epochs"], given["epochs"], given["devices"]) == (1000, 1000, 1)


def test_settings_come_from_the_presets_and_the_case() -> None:
    seven = reproduction(7, None, ["screw"], BASE).cells
    points = {case.method: columns["screw"].critical_points for case, columns in seven.items()}
    assert points == {
        "TheLast": ("pool5",), "TheLast2": ("pool4", "pool5"), "TheLast4": ("pool2", "pool3", "pool4", "pool5"),
    }  # fmt: skip
    nine = reproduction(9, None, ["screw"], BASE).cells
    assert {(v.method, c["screw"].cloner, c["screw"].terms) for v, c in nine.items()} == {
        ("EqualNet", "equal", "total"), ("SmallerNet", "compact", "total"), ("Dir Loss", "compact", "direction"),
        ("MSE Loss", "compact", "value"), ("Total Loss", "compact", "total"),
    }  # fmt: skip
    assert len(reproduce.trainings([reproduction(9, None, ["screw"], BASE)], {0: "0"}, [0])) == 4, (
        "two rows are the same"
    )
    (cifar,) = reproduction(2, "cifar10", ["3"], BASE).cells.values()
    assert cifar["cat"].value_weight == 0.01
    assert (cifar["cat"].resize, cifar["cat"].image_size) == ((256, 256), (224, 224))
    (small,) = reproduction(2, "cifar10", ["3"], {**BASE, "image_size": (64, 64)}).cells.values()
    assert (small["cat"].resize, small["cat"].image_size) == (None, (64, 64))
    assert Settings.from_json(cifar["cat"].as_json()) == cifar["cat"]


def test_the_limit_of_a_training_is_the_presets() -> None:
    paper = {name: value for name, value in BASE.items() if name != "epochs"}
    for base, expected in ((paper, 201), ({**BASE, "epochs": 7}, 7), ({**paper, "model": "dual"}, None)):
        (cells,) = reproduction(2, "cifar10", ["cat"], base).cells.values()
        assert cells["cat"].epochs == expected


def test_cifar10_is_cut_as_in_its_configuration() -> None:
    (cells,) = reproduction(2, "cifar10", ["cat"], {**BASE, "source": "vgg16.tv_in1k"}).cells.values()
    arguments = ["fit", "--config", str(CONFIGS / "cifar10.yaml"), "--model.pretrained", "false"]
    expected = AnomalibCLI(args=arguments, run=False).model.pre_processor.transform
    image = torch.rand(3, 32, 32)
    assert torch.equal(pre_processor(cells["cat"]).transform(image), expected(image))


def test_results_that_are_kept_are_read() -> None:
    folder = Path(reproduce.__file__).parent / "results" / "reproduce" / "trainings"
    kept = list(Results(folder))
    assert len(kept) == len([*folder.glob("*.json")]) > 100
    assert {settings.model for settings, _ in kept} == {"paper", "dual"}
    for settings, result in kept:
        # Those of before there were two models have another name, and are found by what stands in them.
        assert (folder / f"{settings.stem}.json").exists() == ("variant" in result["settings"])
        assert Results(folder).find(settings) is not None


def test_a_result_with_more_views_will_do(tmp_path: Path) -> None:
    (four,) = reproduction(4, None, ["screw"], BASE).cells.values()
    (three,) = reproduction(3, None, ["screw"], BASE).cells.values()
    assert three == four, "Tables 3 and 4 share their trainings"
    last = next(c["screw"] for v, c in reproduction(7, None, ["screw"], BASE).cells.items() if v.last_points is None)
    assert last.views == (SCORES,)
    results = Results(tmp_path)
    results.write(four["screw"], {"settings": four["screw"].as_json()})
    assert results.find(last) is not None
    assert results.find(replace(last, weights="renamed.safetensors")) is not None
    assert results.find(replace(last, weights_sha256="1")) is None
    results.write(last, {"settings": last.as_json()})
    (tmp_path / f"{four['screw'].stem}.json").unlink()
    assert results.find(four["screw"]) is None
    assert json.loads((tmp_path / f"{last.stem}.json").read_text())["settings"]["views"] == [
        {"name": "scores", "anomaly_map": None, "sigma": 4.0, "percentile_scale": False}
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image-size", "30"], "multiples of 32"),
        (["--image-size", "0"], "--image-size: 0: expected a whole number, 1 or more"),
        (["--epochs", "1.5"], "--epochs: 1.5: expected a whole number, 1 or more"),
        (["--seeds", "-1"], "--seeds: -1: expected a whole number, 0 or more"),
        (["--splits", "4294967296"], "expected a seed, 0 to"),
        (["--workers", "-1"], "--workers: -1: expected a whole number, 0 or more"),
        (["--value-weight", "large"], "value_weight='large': expected a number above 0, or 'auto'"),
        (["--no-pretrained", "--source-weights", "some.safetensors"], "asks for random ones. Leave out one of them"),
        (["--dataset", "head_ct", "--classes", "brain_mri"], "expected one of head_ct|0 head_ct"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_starts(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        reproduce.main(["--table", "6", "--source", "small_vgg", "--output", str(tmp_path / "out"), *arguments])
    assert re.search(message, f"{refused.value} {capsys.readouterr().err}")
    assert not (tmp_path / "out").exists()


def test_a_random_source_is_told_by_its_seed(medical: Path, tmp_path: Path) -> None:
    options = ["--dataset", "brain_mri", "--no-pretrained", "--checkpoints", str(tmp_path / "kept")]
    assert reproduce_table(6, medical, tmp_path, *options, "--seeds", "0", "1") == 0
    digests = {settings.seed: settings.weights_sha256 for settings, _ in Results(tmp_path / "trainings")}
    kept = {path.name.partition("-split")[0]: path for path in (tmp_path / "kept").iterdir()}
    for seed, digest in digests.items():
        network = KdMultiresolution.load_from_checkpoint(kept[f"brain_mri-seed{seed}"])
        assert fingerprint(network.model.source) == digest
    assert digests[0] != digests[1]
    assert "0 of 2" in (tmp_path / "table_6_32px.md").read_text(), "seeds are averaged all the same"


def test_models_of_different_trainings_have_different_files(mvtec: Path, tmp_path: Path) -> None:
    short = ["--classes", "bottle", "--limit", "4", "--checkpoints", str(tmp_path / "kept")]
    assert reproduce_table(7, mvtec, tmp_path, *short) == 0
    names = {path.stem for path in (tmp_path / "kept").iterdir()}
    assert names == {path.stem for path in (tmp_path / "trainings").iterdir()}
    assert len(names) == 3


def test_a_model_that_is_to_be_kept_and_is_not_is_trained(medical: Path, tmp_path: Path) -> None:
    options, kept = ["--dataset", "brain_mri"], tmp_path / "kept"
    for more in ([], ["--checkpoints", str(kept)]):
        assert reproduce_table(6, medical, tmp_path, *options, *more) == 0
    ((settings, _),) = Results(tmp_path / "trainings")
    (model,) = kept.iterdir()
    assert model.name == f"{settings.stem}.ckpt"
    modified = model.stat().st_mtime_ns
    assert reproduce_table(6, medical, tmp_path, *options, "--checkpoints", str(kept)) == 0
    assert model.stat().st_mtime_ns == modified


def test_the_reason_of_a_failure_is_kept(medical: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(medical / "brain_mri", data / "brain_mri")
    for path in (data / "brain_mri" / "no").iterdir():
        path.write_bytes(path.read_bytes()[:60])
    assert reproduce_table(6, data, tmp_path, "--dataset", "brain_mri", "--workers", "1") == 1
    text = (tmp_path / "table_6_32px.md").read_text()
    assert re.search(r"failed: .*brain_mri.no.\d+\.png", text), text


def test_reasons_are_one_line() -> None:
    assert in_a_line(RuntimeError("Error downloading:\n  http://a/b")) == "RuntimeError: Error downloading: http://a/b"
    caught = "Caught OSError in DataLoader worker process 0.\nOriginal Traceback:\n  File x\nOSError: a.png: cut off"
    assert in_a_line(OSError(caught)) == "OSError: a.png: cut off"


def test_what_is_not_the_papers_is_said_and_is_another_training(medical: Path, tmp_path: Path) -> None:
    short = ["--dataset", "brain_mri", "--epochs", "1"]
    assert reproduce_table(6, medical, tmp_path, *short) == 0
    options = ["--scale-channels", "--score-points", "pool3", "pool4", "--value-weight", "auto"]
    options += ["--precision", "bf16-mixed"]
    assert reproduce_table(6, medical, tmp_path, *short, *options, "--checkpoints", str(tmp_path / "kept")) == 0
    plain, scaled = sorted(Results(tmp_path / "trainings"), key=lambda pair: pair[0].scale_channels)
    assert "scale_channels" not in plain[1]["settings"], "as in results from before there was a choice"
    assert "precision" not in plain[1]["settings"]
    assert (scaled[0].score_points, scaled[0].value_weight) == (("pool3", "pool4"), "auto")
    assert scaled[0].precision == "bf16-mixed"
    assert plain[1]["metrics"] != scaled[1]["metrics"]
    text = (tmp_path / "table_6_32px.md").read_text()
    assert "value weight auto; scored at pool3, pool4; each channel of the source in units of" in text
    assert "Precision of training: bf16-mixed;" in text
    (checkpoint,) = (tmp_path / "kept").iterdir()
    network = KdMultiresolution.load_from_checkpoint(checkpoint, pretrained=False).model
    assert network.score_points == ("pool3", "pool4")
    assert bool(network.channel_scale.is_measured)


@pytest.mark.parametrize("option", [["--scale-channels"], ["--value-weight", "0.1"], ["--score-points", "pool3"]])
def test_the_dual_model_has_none_of_the_papers_choices(medical: Path, tmp_path: Path, option: list[str]) -> None:
    with pytest.raises(SystemExit, match=option[0]):
        reproduce_table(6, medical, tmp_path, "--model", "dual", *option)
