"""Training images that do not come from anomalib's data sets: all that is asked of them is a name each."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.data import Folder, ImageBatch, ImageItem
from anomalib.engine import Engine
from anomalib.models import AnomalibModule
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader, Dataset

from kd_multiresolution import KdMultiresolution, KdMultiresolutionDual
from kd_multiresolution.training.batches import paths_of
from tests.training.conftest import NUM_IMAGES

pytestmark = pytest.mark.slow

BOTH = (KdMultiresolution, KdMultiresolutionDual)


class Pictures(Dataset[ImageItem]):
    """A plain data set of images and names.

    Args:
        images: (N, 3, H, W).
        names: one per image, or ``None``.
    """

    def __init__(self, images: torch.Tensor, names: list[str] | None) -> None:
        self.images = images
        self.names = names
        self.reads: list[int] = []

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> ImageItem:
        self.reads.append(index)
        name = None if self.names is None else self.names[index]
        return ImageItem(image=self.images[index], image_path=name, gt_label=torch.tensor(0))


def loader(dataset: Dataset[ImageItem]) -> DataLoader[ImageItem]:
    return DataLoader(dataset, batch_size=4, shuffle=True, collate_fn=ImageBatch.collate)


def fit(
    model_class: type[AnomalibModule],
    folder: Path,
    *,
    trainer: dict[str, Any] | None = None,
    cache: str | None = None,
    cache_memory: float = 1.0,
    **data: Any,
) -> AnomalibModule:
    network = model_class(
        "small_vgg", image_size=32, epochs=2, cache=cache, cache_memory=cache_memory, visualizer=False
    )
    settings = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu", **(trainer or {})}
    Engine(default_root_dir=folder, **settings).fit(network, **data)
    return network


@pytest.mark.parametrize("model_class", BOTH)
def test_the_same_images_make_the_same_model_wherever_they_come_from(
    model_class: type[AnomalibModule], data: Folder, tmp_path: Path
) -> None:
    data.setup()
    items = [data.train_data[i] for i in range(len(data.train_data))]
    pictures = Pictures(torch.stack([item.image for item in items]), [item.image_path for item in items])
    theirs = fit(model_class, tmp_path / "anomalib's", datamodule=data).model.state_dict()
    ours = fit(model_class, tmp_path / "plain", train_dataloaders=loader(pictures)).model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items() if isinstance(value, torch.Tensor))


def test_names_need_not_be_files(tmp_path: Path) -> None:
    images = torch.rand(12, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    names = [f"camera 2, part {i}" for i in range(len(images))]
    network = fit(KdMultiresolutionDual, tmp_path, train_dataloaders=loader(Pictures(images, names)))
    held_out = network.held_out.held_out
    assert len(held_out) == 4
    assert held_out < set(names)
    assert network.post_processor.image_threshold.isfinite()
    assert network.eval()(images[:2]).pred_label is not None


def test_images_without_names_are_refused_where_some_are_held_out(tmp_path: Path) -> None:
    images = torch.rand(8, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    with pytest.raises(TypeError, match=r"ImageBatch without image_path: .*needs a name of its own\. Give the batches"):
        fit(KdMultiresolutionDual, tmp_path / "dual", train_dataloaders=loader(Pictures(images, None)))
    network = fit(KdMultiresolution, tmp_path / "paper", train_dataloaders=loader(Pictures(images, None)))
    assert network.trainer.current_epoch == 2, "the paper's model asks for no names"


@pytest.mark.parametrize("batch", [(torch.rand(2, 3, 8, 8), torch.zeros(2)), ImageBatch(image=torch.rand(2, 3, 8, 8))])
def test_what_has_no_names_is_told_by_its_type(batch: Any) -> None:
    with pytest.raises(TypeError, match=f"^{type(batch).__name__} without image_path"):
        paths_of(batch)


def test_names_of_a_batch_in_its_order() -> None:
    assert paths_of(ImageBatch(image=torch.rand(2, 3, 8, 8), image_path=["b", "a"])) == ["b", "a"]


@pytest.mark.parametrize(("memory", "reads"), [(1.0, 2), (1e-6, 3)])
def test_images_that_fit_into_memory_are_read_once_beforehand(memory: float, reads: int, tmp_path: Path) -> None:
    images = torch.rand(8, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    pictures = Pictures(images, [f"part {i}" for i in range(len(images))])
    trainer = {"max_epochs": 1}
    fit(KdMultiresolutionDual, tmp_path, train_dataloaders=loader(pictures), trainer=trainer, cache_memory=memory)
    assert Counter(pictures.reads) == dict.fromkeys(range(len(images)), reads), "and once by the epoch"


LIMITS: list[dict[str, Any]] = [{"limit_train_batches": 1}, {"limit_train_batches": 0.2}, {"fast_dev_run": True}]


@pytest.mark.parametrize("model_class", BOTH)
@pytest.mark.parametrize("trainer", LIMITS, ids=str)
def test_a_limit_of_an_epochs_batches_holds_for_who_looks_at_them_beforehand(
    model_class: type[AnomalibModule], trainer: dict[str, Any], tmp_path: Path
) -> None:
    images = torch.rand(20, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    pictures = Pictures(images, [f"part {i}" for i in range(len(images))])
    network = fit(model_class, tmp_path, train_dataloaders=loader(pictures), trainer={"max_epochs": 1, **trainer})
    assert len(set(pictures.reads)) <= 8, "a batch for names and features, and the step's"
    assert network.trainer.global_step == 1


@pytest.mark.parametrize("model_class", BOTH)
def test_nor_does_the_cache_read_what_an_epoch_has_not(
    model_class: type[AnomalibModule], data: Folder, reads: list[str], tmp_path: Path
) -> None:
    data.train_batch_size = 1
    fit(model_class, tmp_path, datamodule=data, cache="float32", trainer={"max_epochs": 1, "limit_train_batches": 1})
    read = {path for path in reads if "good" in path}
    assert len(read) <= {KdMultiresolution: 1, KdMultiresolutionDual: 5}[model_class], "four, to hold out some, and one"
    assert len(read) < NUM_IMAGES


def test_a_limited_training_is_resumed(data: Folder, tmp_path: Path) -> None:
    data.train_batch_size = 2
    short = {"limit_train_batches": 2}
    whole = fit(KdMultiresolutionDual, tmp_path / "whole", datamodule=data, trainer=short)

    class Save(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "first.ckpt")

    fit(KdMultiresolutionDual, tmp_path / "first", datamodule=data, trainer={**short, "callbacks": [Save()]})
    resumed = fit(
        KdMultiresolutionDual, tmp_path / "second", datamodule=data, trainer=short, ckpt_path=tmp_path / "first.ckpt"
    )
    assert resumed.held_out.held_out == whole.held_out.held_out
    theirs = whole.model.state_dict()
    assert all(
        torch.equal(value, theirs[name])
        for name, value in resumed.model.state_dict().items()
        if isinstance(value, torch.Tensor)
    )
