"""The evaluation after convergence, on pictures small enough to take seconds."""

from __future__ import annotations

import json
import random
from pathlib import Path
from statistics import stdev
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.cli.cli import AnomalibCLI
from anomalib.data import Folder, ImageBatch
from anomalib.engine import Engine
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from lightning import seed_everything
from lightning.pytorch.callbacks import EarlyStopping
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch import nn
from torchvision.transforms.v2 import CenterCrop, Resize, Transform

from kd_multiresolution import EvaluationAfterConvergence, KdMultiresolution, KdMultiresolutionDual
from kd_multiresolution.results.protocol import RESULT_FILE, read_coverage

pytestmark = pytest.mark.slow

METRICS = {"image_AUROC", "image_F1", "pixel_AUROC", "pixel_AUROC_anomalous", "AUPRO"}
SIZE = 32
AT_ONCE = {"window": 1, "tolerance": 0.999}  # converged after two epochs, whatever the loss does


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten normal pictures, some brighter than others, and four with a bright square, larger than the model's."""
    root = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    (root / "masks").mkdir()
    for folder, count in (("good", 6), ("good_test", 4), ("defect", 4)):
        (root / folder).mkdir()
        for number in range(count):
            scale = 80 if folder == "good" else 60 + 30 * number
            picture = generator.uniform(0, scale, (50, 50, 3))
            if folder == "defect":
                mask = np.zeros((50, 50), np.uint8)
                mask[13:31, 13:31] = 255
                picture[mask > 0] += 12 * (number + 1)
                Image.fromarray(mask).save(root / "masks" / f"{number}.png")
            Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(root / folder / f"{number}.png")
    return root


def settings(pictures: Path, val_split_mode: str = "same_as_test") -> dict[str, Any]:
    return {
        "name": "squares", "root": str(pictures), "normal_dir": "good", "normal_test_dir": "good_test",
        "abnormal_dir": "defect", "mask_dir": "masks", "train_batch_size": 3, "eval_batch_size": 3, "num_workers": 0,
        "val_split_mode": val_split_mode, "seed": 0,
    }  # fmt: skip


def model(**arguments: Any) -> KdMultiresolution:
    return KdMultiresolution(**{"source": "small_vgg", "image_size": SIZE, "visualizer": False, **arguments})


def fit(
    network: KdMultiresolution, pictures: Path, folder: Path, val_split_mode: str = "same_as_test", **trainer: Any
) -> Engine:
    seed_everything(0)
    engine = Engine(default_root_dir=folder, logger=False, enable_progress_bar=False, accelerator="cpu", **trainer)
    engine.fit(network, datamodule=Folder(**settings(pictures, val_split_mode)))
    return engine


def raw_scores(network: KdMultiresolution, pictures: Path) -> tuple[list[int], list[float]]:
    data = Folder(**settings(pictures))
    data.setup()
    labels, scores = [], []
    for batch in data.test_dataloader():
        image = network.pre_processor(batch.image)
        labels += batch.gt_label.tolist()
        scores += network.eval().model(image).pred_score.tolist()
    return labels, scores


def test_evaluates_every_interval_after_convergence_and_stops(pictures: Path, tmp_path: Path) -> None:
    evaluation = EvaluationAfterConvergence(evaluations=3, interval=2, **AT_ONCE)
    engine = fit(model(), pictures, tmp_path, callbacks=[evaluation])
    assert evaluation.converged_after == 2
    assert evaluation.epochs == [2, 4, 6]
    assert engine.trainer.current_epoch == 6
    assert set(evaluation.values) == METRICS
    assert all(len(values) == 3 and min(values) >= 0 and max(values) <= 1 for values in evaluation.values.values())

    written = json.loads((Path(engine.trainer.default_root_dir) / RESULT_FILE).read_text())
    assert written == evaluation.summary
    for name, values in evaluation.values.items():
        mean, deviation = sum(values) / 3, stdev(values)
        assert written["metrics"][name] == {
            "mean": pytest.approx(mean),
            "std": pytest.approx(deviation),
            "values": values,
        }
        logged = engine.trainer.logged_metrics
        assert float(logged[f"raw_{name}_mean"]) == pytest.approx(mean)
        assert float(logged[f"raw_{name}_std"]) == pytest.approx(deviation, abs=1e-7)
        assert float(logged[f"raw_{name}"]) == pytest.approx(values[-1])


def test_a_training_that_is_resumed_after_its_last_evaluation_learns_no_more(pictures: Path, tmp_path: Path) -> None:
    def evaluation() -> EvaluationAfterConvergence:
        return EvaluationAfterConvergence(evaluations=2, interval=2, **AT_ONCE)

    first = evaluation()
    engine = fit(model(anomaly_map=None), pictures, tmp_path / "first", callbacks=[first])
    engine.trainer.save_checkpoint(tmp_path / "state.ckpt")
    network, resumed = model(anomaly_map=None, seed=1), evaluation()
    again = Engine(default_root_dir=tmp_path / "second", logger=False, accelerator="cpu", callbacks=[resumed])
    again.fit(network, datamodule=Folder(**settings(pictures)), ckpt_path=tmp_path / "state.ckpt")
    assert again.trainer.current_epoch == 4
    assert resumed.summary == first.summary
    kept = torch.load(tmp_path / "state.ckpt", weights_only=True)["state_dict"]
    assert all(
        torch.equal(tensor, kept[f"model.{k}"])
        for k, tensor in network.model.cloner.state_dict(prefix="cloner.").items()
    )


def test_training_that_ends_before_convergence_is_evaluated_once_and_says_so(pictures: Path, tmp_path: Path) -> None:
    evaluation = EvaluationAfterConvergence()
    fit(model(anomaly_map=None), pictures, tmp_path, callbacks=[evaluation], max_epochs=2)
    assert evaluation.summary["converged_after"] is None
    assert evaluation.summary["evaluated_after"] == [2]
    assert set(evaluation.values) == {"image_AUROC", "image_F1"}, "without a map there are no pixel figures"
    assert evaluation.summary["metrics"]["image_AUROC"]["std"] is None


def test_training_that_another_callback_ends_is_evaluated(pictures: Path, tmp_path: Path) -> None:
    evaluation = EvaluationAfterConvergence()
    # Lightning calls it after all other callbacks: the end of the epoch does not know yet that it is the last.
    stopping = EarlyStopping("train_loss", patience=1, min_delta=100.0, check_on_train_epoch_end=True)
    network = model()
    engine = fit(network, pictures, tmp_path, callbacks=[evaluation, stopping], max_epochs=9)
    assert evaluation.epochs == [2]
    written = json.loads((Path(engine.trainer.default_root_dir) / RESULT_FILE).read_text())
    assert written["evaluated_after"] == [2]
    labels, scores = raw_scores(network, pictures)
    assert evaluation.values["image_AUROC"] == [pytest.approx(roc_auc_score(labels, scores))]


def test_the_dual_model_is_evaluated_with_what_is_normal_to_its_cloners_by_then(pictures: Path, tmp_path: Path) -> None:
    evaluation = EvaluationAfterConvergence(evaluations=1)
    network = KdMultiresolutionDual("small_vgg", image_size=64, visualizer=False)
    # Validation, which has the model look at its held-out images, does not take place.
    fit(network, pictures, tmp_path, callbacks=[evaluation], max_epochs=3, limit_val_batches=0)
    labels, scores = raw_scores(network, pictures)
    assert evaluation.values["image_AUROC"] == [pytest.approx(roc_auc_score(labels, scores))]


def test_training_that_has_not_converged_is_evaluated_after_its_last_epochs(pictures: Path, tmp_path: Path) -> None:
    evaluation = EvaluationAfterConvergence(evaluations=3, interval=2)
    fit(model(anomaly_map=None), pictures, tmp_path, callbacks=[evaluation], max_epochs=7)
    assert evaluation.summary["converged_after"] is None
    assert evaluation.epochs == [3, 5, 7]
    assert evaluation.summary["metrics"]["image_AUROC"]["std"] is not None


@pytest.mark.parametrize(
    ("max_epochs", "expected"),
    [
        (9, [4, 6, 8]),  # converged long before the limit: the limit does not matter
        (7, [4, 6, 7]),  # converged shortly before the limit: what was evaluated after three epochs does not count
        (3, [1, 3]),  # not converged
    ],
)
def test_convergence_and_limit_together(
    pictures: Path, tmp_path: Path, max_epochs: int, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EvaluationAfterConvergence, "converged", property(lambda self: len(self.losses) >= 4))
    evaluation = EvaluationAfterConvergence(evaluations=3, interval=2)
    fit(model(anomaly_map=None), pictures, tmp_path, callbacks=[evaluation], max_epochs=max_epochs)
    assert evaluation.epochs == expected


def test_training_is_the_same_with_and_without(pictures: Path, tmp_path: Path) -> None:
    evaluation = EvaluationAfterConvergence(evaluations=100, interval=1, **AT_ONCE)
    networks = [model(epochs=5, score_points=["pool4"]) for _ in range(2)]
    fit(networks[0], pictures, tmp_path / "with", callbacks=[evaluation], max_epochs=5)
    after = (torch.rand(1), np.random.rand(1), random.random())
    fit(networks[1], pictures, tmp_path / "without")
    assert after == (torch.rand(1), np.random.rand(1), random.random())
    assert evaluation.epochs == [2, 3, 4, 5]
    assert len(set(evaluation.values["AUPRO"])) > 1, "the evaluations see the weights of their epochs"
    states = [network.model.state_dict() for network in networks]
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items() if "cloner" in name)


def test_modules_stay_in_their_modes(pictures: Path, tmp_path: Path) -> None:
    network = model()
    modes = []

    class Watching(EvaluationAfterConvergence):
        def evaluate(self, trainer: Any, pl_module: Any) -> dict[str, float]:
            modes.append({name: module.training for name, module in pl_module.named_modules()})
            metrics = super().evaluate(trainer, pl_module)
            modes.append({name: module.training for name, module in pl_module.named_modules()})
            return metrics

    fit(network, pictures, tmp_path, callbacks=[Watching()], max_epochs=1)
    assert modes[0] == modes[1]
    assert modes[0]["model.cloner"]
    assert not modes[0]["model.source"]


def test_figures_are_those_of_raw_scores_where_anomalib_clamps_them(pictures: Path, tmp_path: Path) -> None:
    """The validation set is normal, so that anomalib's clamp makes all test scores beyond its range equal."""
    evaluation = EvaluationAfterConvergence()
    network = model(post_processor=PostProcessor(), source="efficientnet_lite0")
    engine = fit(network, pictures, tmp_path, "from_train", callbacks=[evaluation], max_epochs=2)
    expected = roc_auc_score(*raw_scores(network, pictures))
    assert evaluation.values["image_AUROC"] == [pytest.approx(expected)]
    (printed,) = engine.test(network, datamodule=Folder(**settings(pictures, "from_train")))
    assert abs(printed["image_AUROC"] - expected) > 0.01, "the test needs scores that the clamp ties"


def test_scores_are_those_of_a_test_in_the_same_precision(pictures: Path, tmp_path: Path) -> None:
    scores: dict[str, list[float]] = {"evaluation": [], "test": []}

    class Scores(EvaluationAfterConvergence):
        """Notes the scores of the evaluation, and those of anomalib's test."""

        def models(self, pl_module: AnomalibModule) -> dict[str, nn.Module]:
            pl_module.model.register_forward_hook(lambda _, __, found: scores[part].extend(found.pred_score.tolist()))
            return {"": pl_module.model}

    part, network = "evaluation", model(anomaly_map=None, post_processor=False)
    engine = fit(
        network, pictures, tmp_path, callbacks=[Scores()], max_epochs=1, limit_val_batches=0, precision="bf16-mixed"
    )
    exact = raw_scores(network, pictures)[1]
    part, scores["evaluation"] = "test", scores["evaluation"][: len(exact)]
    engine.test(network, datamodule=Folder(**settings(pictures)))
    assert scores["evaluation"] == scores["test"] != exact


def test_resumed_training_goes_on_with_its_evaluations(pictures: Path, tmp_path: Path) -> None:
    first = EvaluationAfterConvergence(evaluations=3, interval=1, **AT_ONCE)
    engine = fit(model(epochs=4), pictures, tmp_path / "first", callbacks=[first], max_epochs=3)
    assert first.epochs == [2, 3]
    resumed = EvaluationAfterConvergence(evaluations=3, interval=1, **AT_ONCE)
    runner = Engine(
        default_root_dir=tmp_path / "second", logger=False, enable_progress_bar=False, accelerator="cpu",
        callbacks=[resumed],
    )  # fmt: skip
    runner.fit(model(), datamodule=Folder(**settings(pictures)), ckpt_path=engine.best_model_path)
    assert resumed.epochs == [2, 3, 4]
    assert resumed.converged_after == 2
    assert all(resumed.values[name][:2] == values for name, values in first.values.items())


def test_masks_are_resized_like_the_images_and_left_fractional(pictures: Path) -> None:
    data = Folder(**settings(pictures))
    data.setup()
    network = model()
    mask_files = dict(zip(data.test_data.samples.image_path, data.test_data.samples.mask_path, strict=True))
    for batch in data.test_dataloader():
        coverage = read_coverage(batch, mask_files, network.pre_processor)
        assert coverage.shape == (len(batch.gt_label), SIZE, SIZE)
        assert not coverage[batch.gt_label == 0].any()
        for covered in coverage[batch.gt_label == 1]:
            # 18 of 50 pixels in each direction, and the border pixels of the smaller image are covered in part.
            assert float(covered.mean()) == pytest.approx((18 / 50) ** 2, rel=0.1)
            assert ((covered > 0) & (covered < 1)).any()


def test_a_later_limit_has_its_own_last_epochs(pictures: Path, tmp_path: Path) -> None:
    engine = fit(model(), pictures, tmp_path / "first", callbacks=[EvaluationAfterConvergence(3, 1)], max_epochs=4)
    resumed = EvaluationAfterConvergence(3, 1)
    longer = Engine(
        default_root_dir=tmp_path / "longer", logger=False, accelerator="cpu", callbacks=[resumed], max_epochs=8
    )
    longer.fit(model(), datamodule=Folder(**settings(pictures)), ckpt_path=engine.best_model_path)
    assert longer.trainer.current_epoch == 8
    written = json.loads((Path(longer.trainer.default_root_dir) / RESULT_FILE).read_text())
    assert written["evaluated_after"] == [6, 7, 8]
    assert all(len(found["values"]) == 3 for found in written["metrics"].values())


@pytest.mark.parametrize("defect", [1, 255])
def test_a_mask_is_what_is_above_zero(defect: int, tmp_path: Path) -> None:
    mask = np.zeros((8, 8), np.uint8)
    mask[2:6, 2:6] = defect
    Image.fromarray(mask).save(tmp_path / "mask.png")
    batch = ImageBatch(
        image=torch.rand(1, 3, 8, 8), image_path=["1.png"], gt_label=torch.tensor([1]), gt_mask=torch.tensor(mask)[None]
    )  # fmt: skip
    coverage = read_coverage(batch, {"1.png": str(tmp_path / "mask.png")}, None)
    assert torch.equal(coverage[0], torch.tensor(mask > 0).float())


@pytest.mark.parametrize(("augmentation", "missing"), [(CenterCrop(40), True), (Resize((SIZE, SIZE)), False)])
def test_augmented_images_have_no_coverage(
    augmentation: Transform, missing: bool, pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    evaluation = EvaluationAfterConvergence()
    data = Folder(**settings(pictures), test_augmentations=augmentation)
    engine = Engine(default_root_dir=tmp_path, logger=False, accelerator="cpu", callbacks=[evaluation], max_epochs=1)
    with caplog.at_level("INFO"):
        engine.fit(model(), datamodule=data)
    assert set(evaluation.values) == METRICS - ({"pixel_AUROC_anomalous"} if missing else set())
    assert ("pixel_AUROC_anomalous is left out: CenterCrop" in caplog.text) == missing


def test_masks_without_a_file_have_no_coverage() -> None:
    masks = torch.ones(1, 8, 8).bool()
    batch = ImageBatch(
        image=torch.rand(1, 3, 8, 8), image_path=["1.png"], gt_label=torch.tensor([1]), gt_mask=masks
    )  # fmt: skip
    assert read_coverage(batch, {}, None) is None


@pytest.mark.parametrize("arguments", [{"evaluations": 0}, {"interval": 0}, {"window": 0}, {"tolerance": 1.0}])
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any]) -> None:
    ((name, value),) = arguments.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        EvaluationAfterConvergence(**arguments)


def test_without_a_data_module_it_says_so_before_training(pictures: Path, tmp_path: Path) -> None:
    data = Folder(**settings(pictures))
    data.setup()
    engine = Engine(default_root_dir=tmp_path, logger=False, callbacks=[EvaluationAfterConvergence()])
    with pytest.raises(ValueError, match="give fit a datamodule"):
        engine.fit(model(), train_dataloaders=data.train_dataloader())


def test_an_earlier_runs_data_module_is_none(pictures: Path, tmp_path: Path) -> None:
    data = Folder(**settings(pictures))
    engine = Engine(default_root_dir=tmp_path, logger=False, callbacks=[EvaluationAfterConvergence()])
    network = model(anomaly_map=None)
    engine.validate(network, datamodule=data)
    with pytest.raises(ValueError, match="give fit a datamodule"):
        engine.fit(network, train_dataloaders=data.train_dataloader())


def test_a_test_set_of_one_kind_is_refused_before_training(pictures: Path, tmp_path: Path) -> None:
    data = Folder(**{**settings(pictures), "test_split_mode": "none"})  # leaves the anomalous images alone
    engine = Engine(default_root_dir=tmp_path, logger=False, callbacks=[EvaluationAfterConvergence()])
    with pytest.raises(ValueError, match="4 of 4 test images are anomalous"):
        engine.fit(model(), datamodule=data)


def test_command_line_switches_it_on(pictures: Path, tmp_path: Path) -> None:
    data = [f"--data.{key}={value}" for key, value in settings(pictures).items()]
    AnomalibCLI(
        args=[
            "train", "--model=kd_multiresolution", "--model.source=small_vgg", f"--model.image_size={SIZE}",
            "--model.visualizer=false", "--data=Folder", *data, f"--default_root_dir={tmp_path}",
            "--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.enable_progress_bar=false",
            "--trainer.callbacks+=kd_multiresolution.EvaluationAfterConvergence",
            "--trainer.callbacks.evaluations=2", "--trainer.callbacks.interval=1",
            "--trainer.callbacks.window=1", "--trainer.callbacks.tolerance=0.999",
        ]
    )  # fmt: skip
    (file,) = tmp_path.rglob(f"v0/{RESULT_FILE}")
    assert json.loads(file.read_text())["evaluated_after"] == [2, 3]
