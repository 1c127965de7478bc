"""A resumed training is the uninterrupted one, to the bit: of either model, wherever it was interrupted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from lightning.pytorch import Callback, Trainer
from torchvision.transforms.v2 import RandomHorizontalFlip
from torchvision.utils import save_image

from kd_multiresolution import ConvergenceStopping, KdMultiresolution, KdMultiresolutionDual
from kd_multiresolution.dual.held_out import HeldOutImages
from kd_multiresolution.dual.torch_model import KdMultiresolutionDualModel
from kd_multiresolution.source.network import Source
from kd_multiresolution.training.feature_cache import FeatureCache

pytestmark = pytest.mark.slow

SIZE = 32
NUM_IMAGES = 11
BATCH = 5  # the last one of an epoch is a single image, which convolutions may compute otherwise
STEPS = 3  # per epoch
EPOCHS = 3
MODELS = {"paper": KdMultiresolution, "dual": KdMultiresolutionDual}


class Case(NamedTuple):
    """A way of training."""

    model: str
    cache: str | None = "float32"
    threads: int = 1
    augmented: bool = False


MOMENTS = {"within": STEPS + 2, "last step": 2 * STEPS, "validation": None, "epoch": None}
WAYS = {("float32", 1): [*MOMENTS], ("float32", 2): ["epoch"], ("float16", 1): ["within"], (None, 1, True): ["within"]}
CASES = [(Case(model, *way), moment) for model in MODELS for way, moments in WAYS.items() for moment in moments]


class Saving(Callback):
    """Writes a checkpoint at each moment of the second epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        for moment, step in MOMENTS.items():
            if trainer.global_step == step:
                trainer.save_checkpoint(self.folder / f"{moment}.ckpt")

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._save(trainer, "validation")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._save(trainer, "epoch")

    def _save(self, trainer: Trainer, moment: str) -> None:
        if trainer.current_epoch == 1:
            trainer.save_checkpoint(self.folder / f"{moment}.ckpt")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for folder, count in (("good", NUM_IMAGES), ("bad", 2)):
        (root / folder).mkdir()
        for i in range(count):
            save_image(torch.rand(3, SIZE, SIZE, generator=generator), root / folder / f"{i}.png")
    return root


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def train(
    case: Case, pictures: Path, out: Path, *callbacks: Callback, checkpoint: Path | None = None, epochs: int = EPOCHS
) -> Engine:
    torch.set_num_threads(case.threads)
    torch.manual_seed(len(str(out)))  # what was drawn before a training does not matter
    model = MODELS[case.model](
        "small_vgg", critical_points=["pool2", "pool3", "pool4"], image_size=SIZE, epochs=epochs, cache=case.cache,
        visualizer=False, evaluator=False,
    )  # fmt: skip
    data = Folder(
        "parts", root=pictures, normal_dir="good", abnormal_dir="bad", normal_test_dir="bad", num_workers=0,
        train_batch_size=BATCH, val_split_mode="same_as_test", seed=0,
        train_augmentations=RandomHorizontalFlip() if case.augmented else None,
    )  # fmt: skip
    engine = Engine(
        default_root_dir=out, callbacks=[*callbacks], logger=False, accelerator="cpu", enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    engine.fit(model, datamodule=data, ckpt_path=checkpoint)
    return engine


def state(engine: Engine) -> dict[str, Any]:
    """Return weights, statistics and thresholds, what optimiser and schedule know, and how far the training is."""
    trainer = engine.trainer
    optimizer = trainer.optimizers[0].state_dict()
    return {
        **trainer.lightning_module.state_dict(),
        **{f"optimizer.{i}.{name}": value for i, part in optimizer["state"].items() for name, value in part.items()},
        "groups": optimizer["param_groups"],
        "schedules": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "progress": (trainer.current_epoch, trainer.global_step),
    }


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, theirs[name], rtol=0, atol=0, equal_nan=True, msg=f"{name} differs")
        else:
            assert value == theirs[name], name


@pytest.fixture(scope="module")
def whole(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], tuple[Path, dict[str, Any]]]:
    """Return what gives, of an uninterrupted training, the folder of its checkpoints and its state at the end."""

    @cache
    def trained(case: Case) -> tuple[Path, dict[str, Any]]:
        folder = tmp_path_factory.mktemp("whole")
        return folder, state(train(case, pictures, folder, Saving(folder)))

    return trained


@pytest.mark.parametrize(("case", "moment"), CASES, ids=str)
def test_a_resumed_training_is_the_uninterrupted_one(
    whole: Callable[[Case], tuple[Path, dict[str, Any]]], case: Case, moment: str, pictures: Path, tmp_path: Path
) -> None:
    folder, expected = whole(case)
    assert_same(state(train(case, pictures, tmp_path, checkpoint=folder / f"{moment}.ckpt")), expected)


def test_a_finished_training_goes_on_as_a_longer_one(pictures: Path, tmp_path: Path) -> None:
    case = Case("paper")
    short = train(case, pictures, tmp_path / "short", epochs=2)
    short.trainer.save_checkpoint(tmp_path / "short.ckpt")
    resumed = train(case, pictures, tmp_path / "resumed", checkpoint=tmp_path / "short.ckpt")
    assert_same(state(resumed), state(train(case, pictures, tmp_path / "whole")))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("memory", [0.0, 1.0])
def test_features_are_at_once_as_they_will_be_read(dtype: str, memory: float, tmp_path: Path) -> None:
    images, paths = torch.rand(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)), ["a", "b", "c"]
    # A source that was not made for channels last, as weights that somebody has loaded may be.
    cache = FeatureCache(Source("small_vgg"), len(paths), memory=memory, folder=tmp_path, dtype=dtype)
    computed, read = (cache.features(paths, images) for _ in range(2))
    for now, then in zip(computed, read, strict=True):
        assert torch.equal(now, then)
        assert now.stride() == then.stride()


def test_held_out_features_do_not_depend_on_the_batches() -> None:
    images = torch.rand(9, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    paths = [str(i) for i in range(len(images))]
    model = KdMultiresolutionDualModel("small_vgg", critical_points=["pool2", "pool3", "pool4"])
    found = []
    for size in (1, 9):
        held_out = HeldOutImages(model, 0)
        rows = [[*range(start, start + size)] for start in range(0, 9, size)]
        batches = [([paths[i] for i in part], images[part], model.source(images[part])) for part in rows]
        held_out.start(paths, batches, lambda tensor: tensor, resumed=False)
        found.append(held_out._normal)
    assert all(torch.equal(alone, together) for alone, together in zip(*found, strict=True))


def test_the_mean_loss_of_an_epoch_survives_an_interruption() -> None:
    def go_on(stopping: ConvergenceStopping, losses: list[float], *, to_the_end: bool = True) -> ConvergenceStopping:
        for i, loss in enumerate(losses):
            last = to_the_end and i == len(losses) - 1
            trainer = SimpleNamespace(
                is_last_batch=last, strategy=SimpleNamespace(reduce=lambda tensor, reduce_op: tensor)
            )
            outputs, batch = {"loss": torch.tensor(loss)}, SimpleNamespace(batch_size=i + 1)
            stopping.on_train_batch_end(trainer, None, outputs, batch, i)  # type: ignore[arg-type]
        return stopping

    resumed = ConvergenceStopping()
    resumed.load_state_dict(go_on(ConvergenceStopping(), [0.7], to_the_end=False).state_dict())
    first, *rest = go_on(go_on(ConvergenceStopping(), [0.7, 0.7]), [0.1, 0.3]).losses
    assert first == pytest.approx(0.7)
    assert rest == [pytest.approx((0.1 + 2 * 0.3) / 3)], "each epoch has a mean of its own"
    assert go_on(resumed, [0.1]).losses == [pytest.approx(0.4)]


def test_a_try_of_one_batch_computes_no_more_than_that(pictures: Path, tmp_path: Path) -> None:
    seen: list[int] = []
    model = KdMultiresolution("small_vgg", critical_points=["pool2"], image_size=SIZE, epochs=1, anomaly_map=None)
    model.model.source.register_forward_pre_hook(lambda _, arguments: seen.append(len(arguments[0])))
    data = Folder(
        "parts", root=pictures, normal_dir="good", abnormal_dir="bad", normal_test_dir="bad", num_workers=0,
        train_batch_size=2, eval_batch_size=2, val_split_mode="same_as_test",
    )  # fmt: skip
    Engine(default_root_dir=tmp_path, fast_dev_run=True, accelerator="cpu").fit(model, datamodule=data)
    assert sum(seen) < NUM_IMAGES
