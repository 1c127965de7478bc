"""The data sets of the paper: module, preset, classes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anomalib.data
from anomalib.data import AnomalibDataModule
from lightning.pytorch.trainer.states import TrainerFn

import kd_multiresolution.data  # noqa: F401 - registers our data modules with anomalib
from kd_multiresolution.paper.presets import PRESETS, Preset
from reproduction.settings import Settings


@dataclass(frozen=True)
class Dataset:
    """A data set, as it is reproduced on."""

    preset: str  # name of its preset
    module: str  # name of its data module
    class_argument: str | None = None  # the data module's argument that takes the class, if there is one
    arguments: tuple[tuple[str, Any], ...] = ()  # the data module's other arguments
    splits: bool = False  # whether its test set is drawn at random

    @property
    def settings(self) -> Preset:
        """The paper's settings."""
        return PRESETS[self.preset]


def _of_preset(name: str, **fields: Any) -> Dataset:
    # A preset's only argument of the data module is the class.
    return Dataset(name, PRESETS[name].data, next(iter(PRESETS[name].data_arguments), None), **fields)


DATASETS = {
    "mnist": _of_preset("mnist"),
    "fashion_mnist": _of_preset("fashion_mnist"),
    "cifar10": _of_preset("cifar10"),
    "cifar10_folder": Dataset("cifar10", "OneClassFolder", "normal_class"),
    "mvtec": _of_preset("mvtec"),
    "retinal_oct": _of_preset("retinal_oct"),
    "resc": Dataset("retinal_oct", "BMAD", arguments=(("category", "Retina_RESC"),)),
    "brain_mri": _of_preset("brain_mri", splits=True),
    "head_ct": _of_preset("head_ct", splits=True),
}


def data_module(settings: Settings, root: Path | None, workers: int) -> AnomalibDataModule:
    """Return the data module of an experiment, set up, and cut down if the settings say so."""
    dataset = DATASETS[settings.dataset]
    arguments: dict[str, Any] = {
        "train_batch_size": settings.batch_size,
        "eval_batch_size": settings.batch_size,
        "num_workers": workers,
        **dict(dataset.arguments),
    }
    if root is not None:
        arguments["root"] = root
    if dataset.class_argument:
        arguments[dataset.class_argument] = settings.normal_class
    if settings.split is not None:
        arguments["split_seed"] = settings.split
    if settings.augment:
        arguments["augment"] = True
    module: AnomalibDataModule = getattr(anomalib.data, dataset.module)(**arguments)
    module.prepare_data()
    # As the trainer calls it; the trainer's own call then leaves the data as they are.
    module.setup(TrainerFn.FITTING)
    if settings.limit is not None:
        chosen = _spread(list(range(len(module.train_data))), settings.limit)
        module.train_data = module.train_data.subsample(chosen, inplace=False)
        labels = module.test_data.samples["label_index"].tolist()
        kinds = [[i for i, label in enumerate(labels) if label == kind] for kind in (0, 1)]
        chosen = [index for kind in kinds for index in _spread(kind, settings.limit)]
        module.test_data = module.test_data.subsample(chosen, inplace=False)
    return module


def _spread(items: list[int], count: int) -> list[int]:
    """Return some of the items from beginning to end, so that every class or kind of defect has its share."""
    step = max(len(items) / count, 1)
    return [items[int(position * step)] for position in range(min(count, len(items)))]
