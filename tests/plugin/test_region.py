"""Outside the region of interest nothing is seen: not in training, not in its statistics, thresholds, scores, maps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from anomalib.cli.cli import AnomalibCLI
from anomalib.data import Folder
from anomalib.engine import Engine
from PIL import Image
from torchvision.transforms.v2 import CenterCrop, Resize
from torchvision.utils import save_image

from kd_multiresolution import KdMultiresolution, KdMultiresolutionDual
from kd_multiresolution.dual.painted_defects import painted
from kd_multiresolution.plugin.pictures import STATISTICS, picture_statistics
from kd_multiresolution.plugin.post_processor import UnclampedPostProcessor
from kd_multiresolution.plugin.region import read_region
from kd_multiresolution.source.region import within

pytestmark = pytest.mark.slow

FILE = (96, 80)  # height and width
SIZE = 64
MODELS: dict[str, Any] = {
    "gradient": (KdMultiresolution, {"value_weight": "auto"}),
    "discrepancy": (KdMultiresolution, {"anomaly_map": "discrepancy"}),
    "dual": (KdMultiresolutionDual, {}),
}


def judged() -> torch.Tensor:
    """Return what is judged of a file: a block that is not in the middle."""
    mask = torch.zeros(FILE)
    mask[24:72, 10:50] = 1
    return mask


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return two sets of the same pictures, with other noise outside the region; ``loud`` has defects there, too."""
    root = tmp_path_factory.mktemp("pictures")
    save_image(judged(), root / "region.png")
    for name in ("quiet", "loud"):
        for folder, count in (("good", 16), ("test", 8)):
            (root / name / folder).mkdir(parents=True)
            for i in range(count):
                inside, outside = (
                    torch.rand(3, *FILE, generator=torch.Generator().manual_seed(100 * seed + i)) for seed in (0, 1)
                )
                outside = 0.3 * outside if name == "quiet" else 1 - 0.5 * outside
                picture = torch.where(judged().bool(), 0.3 * inside, outside)
                save_image(picture, root / name / folder / f"{i:02}.png")
    return root


def fitted(kind: str, pictures: Path, name: str, folder: Path, **arguments: Any) -> tuple[Any, Engine]:
    model, settings = MODELS[kind]
    network = model(
        **{
            "source": "small_vgg", "image_size": SIZE, "region": pictures / "region.png", "visualizer": False,
            **settings, **arguments,
        }
    )  # fmt: skip
    data = Folder(
        "blocks", root=pictures / name, normal_dir="good", normal_test_dir="test", train_batch_size=4,
        eval_batch_size=4, num_workers=0, val_split_mode="same_as_test", seed=0,
    )  # fmt: skip
    runner = Engine(default_root_dir=folder, logger=False, enable_progress_bar=False, accelerator="cpu", max_epochs=1)
    runner.fit(network, datamodule=data)
    return network, runner


@pytest.fixture(scope="module", params=MODELS)
def trained(request: pytest.FixtureRequest, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp(request.param)
    return (request.param, folder, *fitted(request.param, pictures, "quiet", folder))


def checkpoint_of(runner: Engine) -> Path:
    return Path(runner.trainer.checkpoint_callback.best_model_path)


def predicted(network: Any, images: Path, folder: Path) -> dict[str, torch.Tensor]:
    runner = Engine(default_root_dir=folder, logger=False, enable_progress_bar=False, accelerator="cpu")
    batches = runner.predict(network, data_path=images)
    names = ("pred_score", "anomaly_map", "pred_mask")
    return {name: torch.cat([getattr(batch, name) for batch in batches]) for name in names}


def test_what_is_outside_changes_no_weight_statistic_or_threshold(trained: Any, pictures: Path, tmp_path: Path) -> None:
    kind, _, network, _ = trained
    other, _ = fitted(kind, pictures, "loud", tmp_path)
    states = [model.state_dict() for model in (network, other)]
    tensors = [name for name, value in states[0].items() if isinstance(value, torch.Tensor)]
    assert "model.source.region" in tensors
    differing = [
        name for name in tensors if not torch.equal(states[0][name].nan_to_num(), states[1][name].nan_to_num())
    ]
    assert differing == []
    assert network.learnt == other.learnt
    if kind == "gradient":
        assert network.model.value_weight == other.model.value_weight


def test_nor_a_score_or_a_map(trained: Any, pictures: Path, tmp_path: Path) -> None:
    _, _, network, _ = trained
    quiet, loud = (predicted(network, pictures / name / "test", tmp_path) for name in ("quiet", "loud"))
    for name in quiet:
        assert torch.equal(quiet[name], loud[name]), name
    region = network.model.source.region[0, 0]
    raw = network.model.eval()(torch.rand(2, 3, SIZE, SIZE)).anomaly_map[:, 0]
    assert (raw[:, ~region] == 0).all()
    assert (raw[:, region] > 0).any()
    assert not quiet["pred_mask"].reshape(-1, SIZE, SIZE)[:, ~region].any()


def test_a_checkpoint_has_it_without_the_file(trained: Any, pictures: Path, tmp_path: Path, monkeypatch: Any) -> None:
    kind, _, network, runner = trained
    saved = torch.load(checkpoint_of(runner), weights_only=True)
    saved["hyper_parameters"]["region"] = "gone.png"
    torch.save(saved, tmp_path / "moved.ckpt")
    loaded = MODELS[kind][0].load_from_checkpoint(tmp_path / "moved.ckpt", visualizer=False)
    assert torch.equal(loaded.model.source.region, network.model.source.region)
    assert loaded.region_size == FILE
    before, after = (predicted(model, pictures / "loud" / "test", tmp_path) for model in (network, loaded))
    assert all(torch.equal(before[name], after[name]) for name in before)
    # The command line, which names no region.
    monkeypatch.chdir(tmp_path)
    arguments = [f"--model.{name}={value}" for name, value in MODELS[kind][1].items()]
    cli = AnomalibCLI(
        ["predict", "--model", MODELS[kind][0].__name__, "--model.source", "small_vgg", *arguments,
         "--model.visualizer", "false", "--data", str(pictures / "quiet" / "test"), "--ckpt_path", "moved.ckpt",
         "--trainer.accelerator", "cpu"]
    )  # fmt: skip
    assert torch.equal(cli.model.model.source.region.cpu(), network.model.source.region)


def test_an_export_has_it(pictures: Path, tmp_path: Path) -> None:
    network, _ = fitted("discrepancy", pictures, "quiet", tmp_path, source="small_vgg")
    session = onnxruntime.InferenceSession(network.to_onnx(tmp_path))
    names = [output.name for output in session.get_outputs()]

    def run(name: str) -> dict[str, np.ndarray]:
        file = pictures / name / "test" / "00.png"
        picture = np.asarray(Image.open(file), np.float32).transpose(2, 0, 1)[None] / 255
        return dict(zip(names, session.run(None, {"input": picture}), strict=True))

    quiet, loud = run("quiet"), run("loud")
    assert all(np.array_equal(quiet[name], loud[name]) for name in names)
    expected = predicted(network, pictures / "loud" / "test" / "00.png", tmp_path)
    assert np.allclose(quiet["pred_score"].reshape(-1), expected["pred_score"].numpy(), atol=1e-4)
    region = network.model.source.region[0].numpy()
    assert not quiet["pred_mask"].reshape(region.shape)[~region].any()


def test_another_region_than_the_checkpoints_is_refused(trained: Any, pictures: Path, tmp_path: Path) -> None:
    kind, _, _, runner = trained
    save_image(1 - judged(), tmp_path / "other.png")
    model, settings = MODELS[kind]
    network = model("small_vgg", image_size=SIZE, region=tmp_path / "other.png", visualizer=False, **settings)
    with pytest.raises(ValueError, match="trained with another region"):
        runner.predict(network, data_path=pictures / "quiet" / "test", ckpt_path=checkpoint_of(runner))


def test_files_of_another_size_are_refused(trained: Any, pictures: Path, tmp_path: Path) -> None:
    _, _, network, _ = trained
    save_image(torch.rand(3, 50, 60), tmp_path / "small.png")
    with pytest.raises(ValueError, match=r"small.png: 60 x 50 pixels; expected 80 x 96"):
        predicted(network, tmp_path / "small.png", tmp_path)


def test_training_on_files_of_another_size_is_refused(pictures: Path, tmp_path: Path) -> None:
    save_image(torch.ones(3, 96, 96), tmp_path / "square.png")
    with pytest.raises(ValueError, match=r"80 x 96 pixels; expected 96 x 96"):
        fitted("discrepancy", pictures, "quiet", tmp_path, region=tmp_path / "square.png")


def test_images_of_another_size_than_the_models_are_refused(trained: Any) -> None:
    _, _, network, _ = trained
    with pytest.raises(ValueError, match=r"its region has \(64, 64\)"):
        network.model.eval()(torch.rand(1, 3, 96, 64))


def test_no_sensitivity_marks_what_is_outside(pictures: Path, tmp_path: Path) -> None:
    network, _ = fitted(
        "dual", pictures, "quiet", tmp_path, post_processor=UnclampedPostProcessor(pixel_sensitivity=0.999)
    )
    for name, value in (("_pixel_threshold", 5.0), ("pixel_min", 0.0), ("pixel_max", 1.0)):
        getattr(network.post_processor, name).fill_(value)
    marked = predicted(network, pictures / "quiet" / "test", tmp_path)["pred_mask"].reshape(-1, SIZE, SIZE).bool()
    region = network.model.source.region[0, 0]
    assert marked[:, region].any()
    assert not marked[:, ~region].any()


def test_a_mask_goes_the_way_of_the_images(tmp_path: Path) -> None:
    save_image(judged(), tmp_path / "region.png")
    seen, size = read_region(tmp_path / "region.png", Resize((48, 40), antialias=False))
    assert size == FILE
    assert torch.equal(seen[0, 0], judged()[::2, ::2].bool())
    cropped, _ = read_region(tmp_path / "region.png", CenterCrop((48, 48)))
    assert torch.equal(cropped[0, 0], judged()[24:72, 16:64].bool())
    whole, _ = read_region(tmp_path / "region.png", None)
    assert torch.equal(whole[0, 0], judged().bool())


def test_a_mask_that_says_nothing_is_refused(tmp_path: Path) -> None:
    save_image(torch.zeros(3, 8, 8), tmp_path / "black.png")
    (tmp_path / "text.png").write_text("no picture")
    for name, words in (
        ("black.png", "nothing is white"),
        ("text.png", "not a readable"),
        ("none.png", "not a readable"),
    ):
        for model in (KdMultiresolution, KdMultiresolutionDual):
            with pytest.raises(ValueError, match=words):
                model("small_vgg", image_size=SIZE, region=tmp_path / name)


def test_statistics_of_pictures_are_those_of_the_region() -> None:
    picture = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    region = torch.zeros(1, 1, 16, 16, dtype=torch.bool)
    region[..., 4:12, 2:14] = True
    cut, whole = picture[..., 4:12, 2:14], picture_statistics(torch.where(region, picture, 7.0), region=region)
    assert all(np.allclose(whole[name], picture_statistics(cut)[name]) for name in STATISTICS)


def test_painted_defects_lie_within() -> None:
    region = torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    region[..., 20:44, 20:44] = True
    images = within(torch.rand(200, 3, 64, 64, generator=torch.Generator().manual_seed(0)), region)
    changed = (painted(images, torch.Generator().manual_seed(0), region) - images).abs().amax(1) > 0.05
    centres = torch.stack([spot.nonzero().float().mean(0) for spot in changed if spot.any()])
    assert len(centres) > 150
    assert ((centres > 19) & (centres < 45)).all()


def test_a_checkpoint_brings_its_own_region(tmp_path: Path) -> None:
    for model in (KdMultiresolution, KdMultiresolutionDual):
        with pytest.raises(ValueError, match=r"region='other.png': a checkpoint brings its own region"):
            model.load_from_checkpoint(tmp_path / "none.ckpt", region="other.png")


def test_the_next_checkpoint_brings_another(pictures: Path, tmp_path: Path) -> None:
    mask = torch.zeros(1, *FILE)
    mask[:, :48] = 1
    save_image(mask, tmp_path / "upper.png")
    runners = [
        fitted("gradient", pictures, "quiet", tmp_path / region.stem, region=region)[1]
        for region in (pictures / "region.png", tmp_path / "upper.png")
    ]
    network = KdMultiresolution.load_from_checkpoint(checkpoint_of(runners[0]))
    Engine(default_root_dir=tmp_path, logger=False, accelerator="cpu").predict(
        network, data_path=pictures / "quiet" / "test", ckpt_path=checkpoint_of(runners[1])
    )
    expected = KdMultiresolution.load_from_checkpoint(checkpoint_of(runners[1])).source.region
    assert torch.equal(network.source.region, expected)
