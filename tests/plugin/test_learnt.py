"""What normal images were like, as a model and its checkpoints keep it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from PIL import Image
from torchvision.transforms.v2 import Compose, Normalize, Resize

from kd_multiresolution import KdMultiresolution, KdMultiresolutionDual
from kd_multiresolution.plugin.learnt import MOST, LearntNormals, distribution
from kd_multiresolution.plugin.pictures import STATISTICS, picture_statistics
from tests.data.generated import write_squares

pytestmark = pytest.mark.slow

MODELS = [KdMultiresolution, KdMultiresolutionDual]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_squares(tmp_path_factory.mktemp("pictures"), {"good": 16, "defect": 2}, size=64)


def trained(kind: type, pictures: Path, folder: Path) -> tuple[KdMultiresolution | KdMultiresolutionDual, Path]:
    data = Folder(
        "noise", root=pictures, normal_dir="good", abnormal_dir="defect", train_batch_size=4, eval_batch_size=4,
        num_workers=0, val_split_mode="same_as_test", test_split_ratio=0.25, seed=0,
    )  # fmt: skip
    network = kind("small_vgg", image_size=64, sigma=1.0, visualizer=False, imagenet_normalization=True)
    engine = Engine(default_root_dir=folder, logger=False, enable_progress_bar=False, accelerator="cpu", max_epochs=1)
    engine.fit(network, datamodule=data)
    return network, Path(engine.trainer.checkpoint_callback.best_model_path)


@pytest.mark.parametrize("kind", MODELS)
def test_a_checkpoint_keeps_scores_of_normal_images_it_has_not_learnt_from(
    kind: type, pictures: Path, tmp_path: Path
) -> None:
    network, checkpoint = trained(kind, pictures, tmp_path)
    learnt = kind.load_from_checkpoint(checkpoint).learnt
    assert learnt == network.learnt
    # The dual model holds four of twelve out, the paper's looks at the four good images of the validation.
    assert len(learnt.scores) == 4
    assert list(learnt.scores) == sorted(learnt.scores)
    assert learnt.origin == ("good validation images" if kind is KdMultiresolution else "held-out training images")
    assert learnt.percentile(learnt.scores[1]) == 50
    assert {name: len(values) for name, values in learnt.pictures.items()} == dict.fromkeys(STATISTICS, 12)
    assert np.allclose(learnt.pictures["brightness"], 0.15, atol=0.01), "grey values of the files"


def test_scores_are_those_of_the_weights_beside_them(pictures: Path, tmp_path: Path) -> None:
    network, _ = trained(KdMultiresolutionDual, pictures, tmp_path)
    network.eval()
    files = [pictures / "good" / name for name in network.held_out.names]
    images = torch.stack([torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) / 255 for file in files])
    with torch.no_grad():
        scores = network.model(network.pre_processor(images)).pred_score
    assert np.allclose(sorted(scores.tolist()), network.learnt.scores, rtol=1e-3)


@pytest.mark.parametrize("kind", MODELS)
def test_a_checkpoint_without_it_loads(kind: type, pictures: Path, tmp_path: Path) -> None:
    _, path = trained(kind, pictures, tmp_path)
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["kd_multiresolution"]["learnt"]
    torch.save(checkpoint, path)
    learnt = kind.load_from_checkpoint(path).learnt
    assert learnt == LearntNormals()
    assert learnt.percentile(1.0) is None


def test_a_distribution_is_bounded() -> None:
    numbers = np.random.default_rng(0).normal(size=10 * MOST + 1)
    kept = distribution(numbers)
    assert len(kept) == MOST
    assert (kept[0], kept[-1]) == (numbers.min(), numbers.max())
    assert np.allclose(np.quantile(kept, [0.1, 0.5, 0.9]), np.quantile(numbers, [0.1, 0.5, 0.9]), atol=0.01)


def test_statistics_of_pictures() -> None:
    generator = torch.Generator().manual_seed(0)
    picture = 0.5 * torch.rand(1, 3, 16, 16, generator=generator)
    plain = picture_statistics(picture)
    darker = picture_statistics(0.8 * picture)
    assert np.allclose(darker["brightness"], 0.8 * np.array(plain["brightness"]))
    assert np.allclose(darker["contrast"], 0.8 * np.array(plain["contrast"]))
    assert np.allclose(darker["sharpness"], plain["sharpness"]), "no matter of light"
    softer = picture_statistics(torch.nn.functional.avg_pool2d(picture, 3, 1, 1))
    assert softer["sharpness"][0] < 0.8 * plain["sharpness"][0]
    normalised = Compose([Resize(16), Normalize(mean=[0.4, 0.5, 0.6], std=[0.2, 0.3, 0.4])])
    undone = picture_statistics(normalised(picture), normalised)
    assert all(np.allclose(undone[name], plain[name]) for name in STATISTICS)
    assert picture_statistics(torch.full((1, 3, 16, 16), 0.5))["sharpness"] == [0.0]
