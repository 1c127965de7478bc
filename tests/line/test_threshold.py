"""Thresholds set again from fresh images: a new checkpoint that anomalib loads, tests and exports as any other."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from anomalib.cli.cli import AnomalibCLI
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.post_processing import PostProcessor
from PIL import Image

from kd_multiresolution import KdMultiresolution, KdMultiresolutionDual, set_threshold
from kd_multiresolution.line.command import main
from kd_multiresolution.plugin.checkpoint import KEY
from kd_multiresolution.plugin.post_processor import FalseAlarmPostProcessor, UnclampedPostProcessor
from kd_multiresolution.plugin.threshold_data import ThresholdData
from tests.data.generated import write_squares

pytestmark = pytest.mark.slow

SIZE = 64
COUNTS = {"train": 16, "good": 20, "defect": 6}
MODELS = {"paper": KdMultiresolution, "dual": KdMultiresolutionDual}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_squares(tmp_path_factory.mktemp("pictures"), COUNTS, SIZE, contrast=0.5)


def engine(folder: Path, **arguments: Any) -> Engine:
    return Engine(default_root_dir=folder, logger=False, enable_progress_bar=False, accelerator="cpu", **arguments)


def trained(kind: str, pictures: Path, folder: Path, **arguments: Any) -> Path:
    data = Folder(
        "squares", root=pictures, normal_dir="train", normal_test_dir="good", abnormal_dir="defect", num_workers=0,
        train_batch_size=4, eval_batch_size=4, val_split_mode="same_as_test", seed=0,
    )  # fmt: skip
    settings = {
        "source": "small_vgg", "image_size": SIZE, "visualizer": False, "imagenet_normalization": True,
        **arguments,
    }  # fmt: skip
    if kind == "paper":
        settings["anomaly_map"] = "discrepancy"
    runner = engine(folder, max_epochs=1)
    runner.fit(MODELS[kind](**settings), datamodule=data)
    return Path(runner.trainer.checkpoint_callback.best_model_path)


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request: pytest.FixtureRequest, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(request.param, pictures, tmp_path_factory.mktemp("trained"))


def loaded(path: Path) -> Any:
    name = torch.load(path, weights_only=True)["kd_multiresolution"]["model"]
    return next(model for model in MODELS.values() if model.__name__ == name).load_from_checkpoint(path)


def predicted(path: Path, images: Path, folder: Path) -> dict[str, torch.Tensor]:
    network = loaded(path)
    network.visualizer = None
    batches = engine(folder).predict(network, data_path=images)
    return {
        name: torch.cat([getattr(batch, name) for batch in batches])
        for name in ("pred_score", "pred_label", "pred_mask")
    }


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_at_most_so_many_are_called_defective(checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    before = digest(checkpoint)
    change = set_threshold(checkpoint, tmp_path / "new.ckpt", pictures / "good", false_alarms=3)
    assert digest(checkpoint) == before, "the old file stays"
    assert change.after.alarms == change.after.marked == 3
    assert (change.good, change.expected) == (20, 4 / 21)
    found = predicted(tmp_path / "new.ckpt", pictures / "good", tmp_path)
    assert found["pred_label"].sum() == 3
    assert ((found["pred_score"] > 0.5) == found["pred_label"].bool()).all(), "0.5 is the threshold"
    assert found["pred_mask"].flatten(1).any(1).sum() == 3
    old = predicted(checkpoint, pictures / "good", tmp_path)
    assert old["pred_label"].sum() == change.before.alarms
    order = old["pred_score"].argsort()
    assert (found["pred_score"][order].diff() >= 0).all(), "scores keep their order"
    text = str(change)
    for words in ("Of 20 good images", ", 3 are now", "Threshold of pixels", "19 %", str(tmp_path / "new.ckpt")):
        assert words in text


def test_costs_and_defective_images(checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    folders = (pictures / "good", pictures / "defect")
    dear = set_threshold(checkpoint, tmp_path / "miss.ckpt", *folders, miss_cost=1000, false_alarm_cost=1)
    cheap = set_threshold(checkpoint, tmp_path / "alarm.ckpt", *folders, miss_cost=1, false_alarm_cost=1000)
    assert (dear.after.misses, cheap.after.alarms) == (0, 0)
    assert dear.after.thresholds["image"] <= cheap.after.thresholds["image"]
    for change in (dear, cheap):
        assert change.cost is not None
        assert change.cost[1] <= change.cost[0]
        assert "costs" in str(change)
        assert "Of 6 defective images" in str(change)


@pytest.mark.parametrize("with_images", [False, True])
def test_the_threshold_itself(checkpoint: Path, pictures: Path, tmp_path: Path, with_images: bool) -> None:
    scores = set_threshold(checkpoint, tmp_path / "a.ckpt", pictures / "good", false_alarms=7)
    number = scores.after.thresholds["image"]
    good = {"good": pictures / "good"} if with_images else {}
    change = set_threshold(checkpoint, tmp_path / "new.ckpt", **good, threshold=number)
    assert change.after.thresholds["image"] == number
    found = predicted(tmp_path / "new.ckpt", pictures / "good", tmp_path)
    assert found["pred_label"].sum() == 7
    old, new = loaded(checkpoint), loaded(tmp_path / "new.ckpt")
    assert "a number that was given" in new.threshold_origin
    pixels = [model.post_processor.pixel_threshold for model in (old, new)]
    assert torch.equal(*pixels) == (not with_images)
    assert (new.learnt == old.learnt) == (not with_images)
    assert ("good images" in str(change)) == with_images
    assert change.after.marked == (7 if with_images else None)


def test_a_new_training_forgets_what_its_threshold_was_told_from(
    checkpoint: Path, pictures: Path, tmp_path: Path
) -> None:
    set_threshold(checkpoint, tmp_path / "new.ckpt", threshold=1.0)
    model = loaded(tmp_path / "new.ckpt")
    model.visualizer = None
    data = Folder("squares", root=pictures, normal_dir="train", train_batch_size=4, num_workers=0)
    engine(tmp_path, max_epochs=1).fit(model, datamodule=data)
    assert not model.threshold_origin


@pytest.mark.parametrize(("kind", "tells"), [("paper", True), ("dual", False)])
def test_a_validation_forgets_it_where_it_tells_thresholds(
    kind: str, tells: bool, pictures: Path, tmp_path: Path
) -> None:
    set_threshold(trained(kind, pictures, tmp_path), tmp_path / "new.ckpt", threshold=1.0)
    model = loaded(tmp_path / "new.ckpt")
    data = Folder(
        "squares", root=pictures, normal_dir="train", abnormal_dir="defect", num_workers=0, val_split_mode="from_test"
    )
    before = model.threshold_data
    assert model.threshold_origin
    engine(tmp_path).validate(model, datamodule=data)
    assert bool(model.threshold_origin) != tells
    assert model.threshold_data == (ThresholdData.of(data) if tells else before)
    assert (float(model.post_processor.image_threshold) == 1.0) != tells


def test_what_the_model_holds_later_images_against_are_the_fresh_ones(
    checkpoint: Path, pictures: Path, tmp_path: Path
) -> None:
    set_threshold(checkpoint, tmp_path / "new.ckpt", pictures / "good", false_alarms=0)
    learnt = loaded(tmp_path / "new.ckpt").learnt
    assert learnt.origin == "good images of the threshold"
    assert len(learnt.scores) == len(learnt.pictures["brightness"]) == 20


def test_few_fresh_images_do_not_take_the_place_of_many(checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "few").mkdir()
    for file in sorted((pictures / "good").glob("*.png"))[:7]:
        shutil.copy(file, tmp_path / "few")
    change = set_threshold(checkpoint, tmp_path / "new.ckpt", tmp_path / "few", false_alarms=0)
    assert "7 good images are too few to hold later ones against" in str(change)
    assert loaded(tmp_path / "new.ckpt").learnt == loaded(checkpoint).learnt


def of_files(folder: Path) -> list[torch.Tensor]:
    files = sorted(folder.glob("*.png"))
    return [torch.from_numpy(np.asarray(Image.open(file), np.float32)).permute(2, 0, 1)[None] / 255 for file in files]


def test_what_is_exported_decides_the_same(checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    set_threshold(checkpoint, tmp_path / "new.ckpt", pictures / "good", false_alarms=5)
    network = loaded(tmp_path / "new.ckpt").eval()
    with torch.no_grad():
        assert sum(int(network(picture).pred_label) for picture in of_files(pictures / "good")) == 5


def test_so_does_the_exported_file(pictures: Path, tmp_path: Path) -> None:
    path = trained("paper", pictures, tmp_path, source="small_vgg")
    set_threshold(path, tmp_path / "new.ckpt", pictures / "good", false_alarms=5)
    session = onnxruntime.InferenceSession(loaded(tmp_path / "new.ckpt").to_onnx(tmp_path))
    said = [session.run(["pred_label"], {"input": picture.numpy()})[0] for picture in of_files(pictures / "good")]
    assert sum(int(label.reshape(-1)[0]) for label in said) == 5


def test_the_commands_work_on_it(
    checkpoint: Path,
    pictures: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    main(
        [
            "--checkpoint",
            str(checkpoint),
            "--good",
            str(pictures / "good"),
            "--output",
            "new.ckpt",
            "--false_alarm_rate",
            "0.1",
        ]
    )
    assert "1 are now" in capsys.readouterr().out
    model = type(loaded(checkpoint)).__name__
    arguments = ["--model.source", "small_vgg", "--model.pretrained", "false", "--model.visualizer", "false"]
    if model == "KdMultiresolution":
        arguments += ["--model.anomaly_map", "discrepancy"]
    cli = AnomalibCLI(
        ["predict", "--model", model, *arguments, "--data", str(pictures / "good"), "--ckpt_path", "new.ckpt",
         "--trainer.accelerator", "cpu"]
    )  # fmt: skip
    post_processor = cli.model.post_processor
    written = torch.load("new.ckpt", weights_only=True)["state_dict"]["post_processor._image_threshold"]
    assert post_processor.image_threshold == written


def test_a_sensitivity_does_not_move_the_new_threshold(pictures: Path, tmp_path: Path) -> None:
    path = trained("paper", pictures, tmp_path, post_processor=UnclampedPostProcessor(image_sensitivity=0.9))
    change = set_threshold(path, tmp_path / "new.ckpt", pictures / "good", false_alarms=1)
    assert change.after.alarms == 1
    assert "image_sensitivity was 0.9" in str(change)
    assert predicted(tmp_path / "new.ckpt", pictures / "good", tmp_path)["pred_label"].sum() == 1


@pytest.mark.parametrize("kind", MODELS)
def test_raw_scores_and_other_post_processors(kind: str, pictures: Path, tmp_path: Path) -> None:
    own = PostProcessor() if kind == "paper" else FalseAlarmPostProcessor(enable_normalization=False)
    path = trained(kind, pictures, tmp_path, post_processor=own)
    change = set_threshold(path, tmp_path / "new.ckpt", pictures / "good", false_alarms=2)
    found = predicted(tmp_path / "new.ckpt", pictures / "good", tmp_path)
    assert found["pred_label"].sum() == 2
    if kind == "dual":
        assert change.scale is None
        assert ((found["pred_score"] > change.after.thresholds["image"]) == found["pred_label"].bool()).all()


def test_a_number_is_the_threshold_of_raw_scores(pictures: Path, tmp_path: Path) -> None:
    path = trained("paper", pictures, tmp_path, post_processor=UnclampedPostProcessor(enable_normalization=False))
    scores = predicted(path, pictures / "good", tmp_path)["pred_score"]
    number = float(scores.median())
    set_threshold(path, tmp_path / "new.ckpt", threshold=number)
    found = predicted(tmp_path / "new.ckpt", pictures / "good", tmp_path)
    assert torch.equal(found["pred_score"], scores)
    assert torch.equal(found["pred_label"].bool(), scores > number)


def refused(folder: Path, **arguments: Any) -> str:
    with pytest.raises(ValueError, match=r".") as error:
        set_threshold(**{"output": folder / "no.ckpt", **arguments})
    assert not (folder / "no.ckpt").exists()
    return str(error.value)


def test_what_cannot_be_had_is_refused_in_words(checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    def words(**arguments: Any) -> str:
        return refused(tmp_path, **{"checkpoint": checkpoint, "good": pictures / "good", **arguments})

    assert "999 good images" in words(false_alarm_rate=0.001)
    assert "0 to 19" in words(false_alarms=20)
    assert "0 to 19" in words(false_alarms=-1)
    assert "expected one of" in words()
    assert "false_alarm_rate, false_alarms given" in words(false_alarm_rate=0.1, false_alarms=1)
    assert "folder of defective images" in words(miss_cost=1, false_alarm_cost=1)
    assert "false_alarm_cost" in words(miss_cost=1, defective=pictures / "defect")
    assert "above 0" in words(miss_cost=0, false_alarm_cost=1, defective=pictures / "defect")
    assert "defect_share" in words(false_alarms=1, defect_share=0.1)
    assert "good=" in words(false_alarms=1, good=tmp_path)
    assert "takes a folder of good images" in words(false_alarms=1, good=None)
    assert "threshold=nan" in words(threshold=float("nan"))
    assert "threshold, false_alarms given" in words(threshold=1.0, false_alarms=1)
    assert "good=" in words(false_alarms=1, good=pictures / "nowhere")
    assert "it exists" in words(false_alarms=1, output=checkpoint)
    assert "folder does not exist" in words(false_alarms=1, output=tmp_path / "nowhere" / "no.ckpt")
    assert "no such file" in words(false_alarms=1, checkpoint=tmp_path / "nowhere.ckpt")
    (tmp_path / "junk.ckpt").write_bytes(b"junk")
    assert "not a checkpoint" in words(false_alarms=1, checkpoint=tmp_path / "junk.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    assert "not a checkpoint of kd_multiresolution" in words(false_alarms=1, checkpoint=tmp_path / "other.ckpt")

    def changed(change: Callable[[dict[str, Any]], object]) -> str:
        stored = torch.load(checkpoint, weights_only=True)
        change(stored)
        torch.save(stored, tmp_path / "changed.ckpt")
        return words(false_alarms=1, checkpoint=tmp_path / "changed.ckpt")

    assert "does not say what its model was built with" in changed(lambda stored: stored[KEY].pop("built"))
    assert "does not say what its model was built with" in changed(lambda stored: stored.update({KEY: 1}))
    for name in ("KdMultiresolutionTriple", "set_threshold"):
        assert f"of the model '{name}', which" in changed(lambda stored, name=name: stored[KEY].update(model=name))

    def without_a_tensor(stored: dict[str, Any]) -> None:
        del stored["state_dict"][next(name for name in stored["state_dict"] if name.startswith("model.source."))]

    assert "its tensors are not those of KdMultiresolution" in changed(without_a_tensor)


def test_a_model_without_a_threshold_is_refused(pictures: Path, tmp_path: Path) -> None:
    path = trained("dual", pictures, tmp_path, post_processor=False)
    assert "no post-processor" in refused(tmp_path, checkpoint=path, good=pictures / "good", false_alarms=1)


def test_the_command_refuses_in_words(
    checkpoint: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--output", str(tmp_path / "new.ckpt"), "--false_alarms", "1"]
    damaged = shutil.copytree(pictures / "good", tmp_path / "damaged") / "0.png"
    data = bytearray(damaged.read_bytes())
    start = data.index(b"IDAT") - 4
    damaged.write_bytes(bytes(data[: start + 4]) + bytes(4) + bytes(data[start + 8 :]))  # a chunk without a name
    for arguments, said in (
        (["--checkpoint", "none.ckpt", "--good", str(pictures)], "there is no such file"),
        (["--checkpoint", str(checkpoint), "--good", str(damaged.parent)], "0.png"),
    ):
        with pytest.raises(SystemExit) as ended:
            main([*arguments, *given])
        assert ended.value.code == 2
        assert said in capsys.readouterr().err
