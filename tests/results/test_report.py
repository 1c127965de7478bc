"""The table and the page that tests and predictions write."""

from __future__ import annotations

import csv
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.post_processing import PostProcessor

from kd_multiresolution import KdMultiresolution, KdMultiresolutionDual
from kd_multiresolution.line.command import parser
from kd_multiresolution.plugin.learnt import LearntNormals
from kd_multiresolution.results.report import _vanishes
from tests.data.generated import write_noise_folders
from tests.results.generated import SIZE, data_of

BOTH = pytest.mark.parametrize("kind", [KdMultiresolution, KdMultiresolutionDual])


@pytest.fixture
def noise(tmp_path: Path) -> Path:
    write_noise_folders(tmp_path / "noise", 4)
    return tmp_path / "noise"


def folder(root: Path, **arguments: Any) -> Folder:
    given = {"normal_dir": "good", "abnormal_dir": "bad", "test_split_ratio": 0.5, "seed": 1, **arguments}
    return Folder("noise", root=root, num_workers=0, **given)


def engine(root: Path) -> Engine:
    return Engine(default_root_dir=root, logger=False, accelerator="cpu", enable_progress_bar=False)


def small(kind: Any = KdMultiresolution, **arguments: Any) -> Any:
    return kind("small_vgg", critical_points=["pool2", "pool3", "pool4"], image_size=SIZE, **arguments)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return [*csv.DictReader(file)]


@BOTH
def test_a_test_run_writes_its_table_and_its_page(tmp_path: Path, noise: Path, kind: Any) -> None:
    runner, model = engine(tmp_path), small(kind)
    data = folder(noise, val_split_mode="same_as_test")
    runner.validate(model, datamodule=data)
    runner.test(model, datamodule=data)
    [table], [page] = tmp_path.rglob("scores.csv"), tmp_path.rglob("report.html")
    assert table.parent == page.parent == Path(runner.trainer.default_root_dir)
    known = data_of(page.read_text(encoding="utf-8"))
    written = rows(table)
    assert {Path(row["path"]).parent.name: row["true_label"] for row in written} == {"good": "good", "bad": "defective"}
    assert [row["path"] for row in written] == [image["path"] for image in known["images"]]
    raws = [float(row["raw_score"]) for row in written]
    assert raws == [image["raw"] for image in known["images"]]
    if kind is KdMultiresolutionDual:
        return  # its threshold comes from training
    assert [row["decision"] == "defective" for row in written] == [raw > known["threshold"] for raw in raws]
    x = [2 * (raw - known["axis"]["middle"]) / known["axis"]["span"] for raw in raws]
    normalised = [0.5 + value / (1 + abs(value)) / 2 for value in x]
    assert [float(row["normalised_score"]) for row in written] == pytest.approx(normalised, abs=1e-5)
    assert {row["frame"] for row in written} == {"file 48x40"}
    threshold = sum(sorted(raws)[2:4]) / 2  # between two images
    x = 2 * (threshold - known["axis"]["middle"]) / known["axis"]["span"]
    line = known["settings"][-1]["line"].replace("{sensitivity}", f"{0.5 - x / (1 + abs(x)) / 2:.9g}")
    exec(line.split("\n")[1])  # as the page has it
    runner.test(model, datamodule=data)
    assert [row["decision"] == "defective" for row in rows(table)] == [raw > threshold for raw in raws]
    assert data_of(page.read_text(encoding="utf-8"))["threshold"] == pytest.approx(threshold, rel=1e-5)


@BOTH
def test_a_prediction_of_a_folder_ends_with_both(tmp_path: Path, noise: Path, kind: Any) -> None:
    engine(tmp_path / "results").predict(small(kind), data_path=noise / "bad")
    [table], [page] = tmp_path.rglob("scores.csv"), tmp_path.rglob("report.html")
    assert len(rows(table)) == 4
    assert {(row["run"], row["true_label"], row["decision"]) for row in rows(table)} == {("predict", "", "")}
    assert [image["truth"] for image in data_of(page.read_text(encoding="utf-8"))["images"]] == [None] * 4


def test_a_prediction_does_not_overwrite_a_test(tmp_path: Path, noise: Path) -> None:
    runner, model, data = engine(tmp_path), small(), folder(noise)
    runner.test(model, datamodule=data)
    root = Path(runner.trainer.default_root_dir)
    before = {name: (root / name).read_bytes() for name in ("scores.csv", "report.html")}
    for _ in range(2):
        runner.predict(model, datamodule=data)
    assert before == {name: (root / name).read_bytes() for name in before}
    assert [row["run"] for row in rows(root / "predict" / "scores.csv")] == ["predict"] * len(rows(root / "scores.csv"))
    assert (root / "predict" / "report.html").is_file()
    assert len([*tmp_path.rglob("scores.csv")]) == 2


def test_without_pictures_the_table_stays(tmp_path: Path, noise: Path) -> None:
    engine(tmp_path).test(small(visualizer=False), datamodule=folder(noise))
    assert len([*tmp_path.rglob("scores.csv")]) == 1
    assert not [*tmp_path.rglob("report.html")]


def test_good_images_alone_have_a_page(tmp_path: Path, noise: Path) -> None:
    data = folder(noise, abnormal_dir=None)
    engine(tmp_path).test(small(evaluator=False), datamodule=data)
    [page] = tmp_path.rglob("report.html")
    assert "There are no defective images among them" in page.read_text(encoding="utf-8")


def test_images_of_which_nobody_says_what_they_are_are_in_both(tmp_path: Path, noise: Path) -> None:
    data = folder(noise)
    data.setup()
    loader = data.test_dataloader()
    collate = loader.collate_fn
    loader.collate_fn = lambda items: collate(items).update(gt_label=None, gt_mask=None)
    engine(tmp_path).test(small(anomaly_map="discrepancy", evaluator=False), dataloaders=loader)
    [table] = tmp_path.rglob("scores.csv")
    assert {row["true_label"] for row in rows(table)} == {""}


def test_percentiles_come_from_what_the_checkpoint_knows(tmp_path: Path, noise: Path) -> None:
    model = small()
    model.learnt = LearntNormals(
        "held-out images", (-3.0, -2.0, -1.0, *[1e9] * 5)
    )  # of eight, three lie below every score
    engine(tmp_path).test(model, datamodule=folder(noise))
    [table], [page] = tmp_path.rglob("scores.csv"), tmp_path.rglob("report.html")
    assert {float(row["percentile_of_held_out_normals"]) for row in rows(table)} == {37.5}
    known = data_of(page.read_text(encoding="utf-8"))
    assert known["normals"] == "held-out images"
    assert {image["percentile"] for image in known["images"]} == {37.5}


def test_a_file_that_cannot_be_written_costs_the_run_nothing(
    tmp_path: Path, noise: Path, caplog: pytest.LogCaptureFixture
) -> None:
    runner, model, data = engine(tmp_path), small(), folder(noise)
    runner.test(model, datamodule=data)
    root = Path(runner.trainer.default_root_dir)
    (root / "scores.csv").unlink()
    (root / "scores.csv").mkdir()  # as little to be written as a file that a spreadsheet has open
    caplog.clear()
    caplog.set_level(logging.INFO)
    [figures] = runner.test(model, datamodule=data)
    assert "image_AUROC" in figures
    assert "scores.csv could not be written" in caplog.text
    assert f"Report: {root / 'report.html'}" in caplog.text
    assert "Scores:" not in caplog.text


def test_nor_does_a_page_that_cannot_be_made(
    tmp_path: Path, noise: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kd_multiresolution.results.report.render_page", lambda *_: 1 / 0)
    [figures] = engine(tmp_path).test(small(), datamodule=folder(noise))
    assert "image_AUROC" in figures
    assert "report.html could not be written (division by zero)" in caplog.text
    assert [*tmp_path.rglob("scores.csv")]
    assert not [*tmp_path.rglob("report.html")]


def test_a_page_names_the_file_of_the_weights_that_were_tested(tmp_path: Path, noise: Path) -> None:
    runner, data = Engine(default_root_dir=tmp_path, logger=False, accelerator="cpu", max_epochs=1), folder(noise)
    model = small()
    runner.fit(model, datamodule=data)
    first = Path(runner.trainer.checkpoint_callback.best_model_path)
    kept = shutil.copy(first, tmp_path / "kept model.ckpt")

    def lines(tested: Any) -> str:
        runner.test(tested, datamodule=data)
        [page] = tmp_path.rglob("report.html")
        return " ".join(line["line"] for line in data_of(page.read_text(encoding="utf-8"))["settings"])

    assert str(first) in lines(model)
    loaded = KdMultiresolution.load_from_checkpoint(kept)
    assert f"--checkpoint '{kept}' --output new.ckpt --threshold={{threshold}}" in lines(loaded), "and not the last fit"
    assert "--checkpoint model.ckpt" in lines(small())


def test_the_line_takes_a_negative_threshold() -> None:
    given = ["--checkpoint", "model.ckpt", "--output", "new.ckpt", "--threshold=-1.5e-05"]
    assert parser().parse_args(given).threshold == -1.5e-05


def test_post_processors_of_anomalibs_have_a_line_that_sets_the_threshold_and_no_other(
    tmp_path: Path, noise: Path
) -> None:
    runner, model = engine(tmp_path), small(post_processor=PostProcessor())
    data = folder(noise)
    runner.validate(model, datamodule=data)
    runner.test(model, datamodule=data)
    [page] = tmp_path.rglob("report.html")
    where = [line["where"] for line in data_of(page.read_text(encoding="utf-8"))["settings"]]
    assert where == ["A new checkpoint", "From fresh good images"]


def test_raw_scores_are_those_before_any_post_processor(tmp_path: Path, noise: Path) -> None:
    raws = []
    for arguments in ({}, {"post_processor": False}):
        runner, model, data = engine(tmp_path / str(len(raws))), small(**arguments), folder(noise)
        runner.validate(model, datamodule=data)
        runner.test(model, datamodule=data)
        raws.append([float(row["raw_score"]) for row in rows(Path(runner.trainer.default_root_dir) / "scores.csv")])
    torch.testing.assert_close(*map(torch.tensor, raws))


@pytest.mark.parametrize(
    ("folder", "expected"),
    [("tmpq0_3abcd", True), ("tmpq0_3abcd/run/v0", True), ("tmp.Rv8Qyz0abc", False), ("results/tmpq0_3abcd", False)],
)
def test_only_pythons_temporary_folders_go(folder: str, expected: bool) -> None:
    assert _vanishes(Path(tempfile.gettempdir()) / folder) == expected
    assert not _vanishes(Path(tempfile.gettempdir()))
    assert not _vanishes(Path("/somewhere") / folder)
