from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from anomalib.data import Folder, ImageBatch
from anomalib.engine import Engine
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from kd_multiresolution import KdMultiresolution
from kd_multiresolution.results.judged import JudgedRun, Scale
from kd_multiresolution.results.page import draw_page
from kd_multiresolution.results.report import _vanishes
from kd_multiresolution.results.scored import ScoredImages
from tests.data.generated import write_noise_folders

SIZE = 32
RUN = JudgedRun(scores=Scale("normalised", 0.5), maps=Scale("normalised", 0.5))
RAW = JudgedRun(scores=Scale("raw"), maps=Scale("raw"))


def batch(scores: list[float], labels: list[int]) -> ImageBatch:
    maps = torch.rand(len(scores), 1, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    names = [f"memory/{score}" for score in scores]
    return ImageBatch(
        image=maps.expand(-1, 3, -1, -1), gt_label=torch.tensor(labels).bool(), pred_score=torch.tensor(scores),
        pred_label=torch.tensor(scores) > 0.5, anomaly_map=maps, image_path=names,
    )  # fmt: skip


def scored(run: JudgedRun = RUN) -> ScoredImages:
    images = ScoredImages(run.scores.threshold)
    images.add(batch([0.1, 0.52, 0.2], [0, 0, 0]), run)
    images.add(batch([0.9, 0.4, 0.7, 0.6, 0.8], [1, 1, 1, 1, 1]), run)
    return images


def plots(figure: Figure) -> tuple[Axes, Axes]:
    histogram, curve, *_ = figure.axes
    return histogram, curve


def legend(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_pictures_are_the_highest_and_the_nearest_to_the_threshold() -> None:
    images = scored()
    assert [picture.score for picture in images.most_anomalous] == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.52, 0.4])
    assert [picture.score for picture in images.nearest[:6]] == pytest.approx([0.52, 0.4, 0.6, 0.7, 0.2, 0.8])
    assert [picture.name for picture in images.most_anomalous[:2]] == ["memory/0.9", "memory/0.8"]


def test_processes_together_show_what_one_does() -> None:
    parts = [ScoredImages(0.5), ScoredImages(0.5)]
    parts[0].add(batch([0.1, 0.52, 0.2], [0, 0, 0]), RUN)
    parts[1].add(batch([0.9, 0.4, 0.7, 0.6, 0.8], [1, 1, 1, 1, 1]), RUN)
    joined = ScoredImages(0.5)
    for part in parts:
        joined.merge(part)
    assert joined.scores == scored().scores
    assert [picture.name for picture in joined.borderline] == [picture.name for picture in scored().borderline]


def test_page_counts_false_alarms_and_misses() -> None:
    histogram, curve = plots(draw_page(scored(), RUN))
    assert legend(histogram) == ["3 normal, 1 called defective", "5 defective, 4 called defective", "threshold 0.5"]
    assert legend(curve) == ["as labelled: 33.3% false alarms, 80.0% found"]
    assert curve.get_title() == "ROC curve, AUROC 0.9333"


def test_page_without_threshold_has_nothing_borderline() -> None:
    images = scored(RAW)
    assert images.borderline == []
    figure = draw_page(images, RAW)
    assert legend(plots(figure)[0]) == ["3 normal", "5 defective"]
    assert plots(figure)[0].get_xlabel() == "raw score"
    assert len(figure.axes) == 2 + len(images.most_anomalous)


def test_page_of_one_kind_says_that_there_is_no_curve() -> None:
    images = ScoredImages(0.5)
    images.add(batch([0.1, 0.6], [0, 0]), RUN)
    histogram, curve = plots(draw_page(images, RUN))
    assert legend(histogram) == ["2 normal, 1 called defective", "threshold 0.5"]
    assert curve.get_title().startswith("no ROC curve")


@pytest.mark.parametrize(("visualizer", "fitted"), [(True, True), (True, False), (False, True)])
def test_a_test_run_writes_its_page(tmp_path: Path, visualizer: bool, fitted: bool) -> None:
    write_noise_folders(tmp_path, 4)
    data = Folder("noise", root=tmp_path, normal_dir="good", abnormal_dir="bad", num_workers=0)
    model = KdMultiresolution("small_vgg", image_size=SIZE, visualizer=visualizer)
    engine = Engine(default_root_dir=tmp_path, logger=False, accelerator="cpu")
    if fitted:
        engine.validate(model, datamodule=data)
    engine.test(model, datamodule=data)
    pages = list(tmp_path.rglob("report.png"))
    assert len(pages) == int(visualizer)
    for page in pages:
        assert page.parent == Path(engine.trainer.default_root_dir)
        with Image.open(page) as picture:
            assert picture.width == 1200


@pytest.mark.parametrize(
    ("folder", "expected"),
    [("tmpq0_3abcd", True), ("tmpq0_3abcd/run/v0", True), ("tmp.Rv8Qyz0abc", False), ("results/tmpq0_3abcd", False)],
)
def test_only_pythons_temporary_folders_go(folder: str, expected: bool) -> None:
    assert _vanishes(Path(tempfile.gettempdir()) / folder) == expected
    assert not _vanishes(Path(tempfile.gettempdir()))
    assert not _vanishes(Path("/somewhere") / folder)


def test_images_of_which_nobody_says_what_they_are_are_left_out() -> None:
    unknown = batch([0.95, 0.51], [0, 0])
    unknown.gt_label = None
    images = scored()
    images.add(unknown, RUN)
    assert images.scores == scored().scores
    for kind in ("most_anomalous", "nearest"):
        found, expected = ([picture.name for picture in getattr(each, kind)] for each in (images, scored()))
        assert found == expected


def test_a_test_run_without_truths_has_no_page(tmp_path: Path) -> None:
    write_noise_folders(tmp_path, 4)
    data = Folder("noise", root=tmp_path, normal_dir="good", abnormal_dir="bad", num_workers=0)
    data.setup()
    loader = data.test_dataloader()
    collate = loader.collate_fn
    loader.collate_fn = lambda items: collate(items).update(gt_label=None, gt_mask=None)
    model = KdMultiresolution("small_vgg", image_size=SIZE, anomaly_map="discrepancy", evaluator=False)
    Engine(default_root_dir=tmp_path, logger=False, accelerator="cpu").test(model, dataloaders=loader)
    assert not list(tmp_path.rglob("report.png"))
    assert list(tmp_path.rglob("images/*/*.png")), "but its pictures"
