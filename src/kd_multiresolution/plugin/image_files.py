"""Image files that cannot be read are named, those that would be read wrongly are refused, hidden ones left out."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from anomalib.data import AnomalibDataModule, AnomalibDataset, PredictDataset
from anomalib.data.utils.synthetic import SyntheticAnomalyDataset
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from PIL import Image

from kd_multiresolution.plugin.image_content import check_depth, check_single

logger = logging.getLogger(__name__)

# What PIL raises on damaged files, and on pictures too large for it.
READING_ERRORS = (OSError, SyntaxError, Image.DecompressionBombError)


class ImageFileCheck(Callback):
    """Refuses files that would be read wrongly, leaves hidden ones out, and names a file that could not be read.

    anomalib's data modules do none of it. Each file's header is looked at once.
    """

    def __init__(self) -> None:
        self._checked: set[str] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check all files that will be read before any is: not after a training has been for nothing.

        Raises:
            ValueError: as :meth:`check_dataset`.
        """
        del pl_module
        for dataset in _datasets(trainer, stage):
            self.check_dataset(dataset)

    def check_dataset(self, dataset: object) -> None:
        """Leave hidden files out of one of anomalib's data sets, and check the others; leave any other object alone.

        Raises:
            ValueError: if a file holds more than eight bits per channel, or several pictures; the message names it.
        """
        _leave_hidden_files_out(dataset)
        self._check(image_files(dataset))
        self._check(_mask_files(dataset), masks=True)
        if isinstance(dataset, SyntheticAnomalyDataset):  # some are written anew, with eight bits and a defect
            self._check(dataset.source_samples.image_path)

    def _on_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        del trainer, pl_module, args, kwargs
        # Of data sets that are not anomalib's.
        self._check(getattr(batch, "image_path", None) or ())
        self._check(getattr(batch, "mask_path", None) or (), masks=True)

    on_train_batch_start = on_validation_batch_start = on_test_batch_start = on_predict_batch_start = _on_batch_start

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put the name of the first unreadable file into an error that came from reading one."""
        del pl_module
        # Errors of the operating system have a number; they are about full disks and the like.
        if not isinstance(exception, READING_ERRORS) or getattr(exception, "errno", None) is not None:
            return
        datasets = [dataset for stage in TrainerFn for dataset in _datasets(trainer, stage)]
        files = [file for dataset in datasets for file in (*image_files(dataset), *_mask_files(dataset))]
        if any(file in str(exception) for file in files):
            return
        for file in files:
            if why := _damage(file):
                exception.args = (
                    f"{file}: not a readable image ({why}). Replace the file, or take it out of the folder.",
                )
                return

    def _check(self, paths: Iterable[str | None], *, masks: bool = False) -> None:
        for path in paths:
            # Images in memory have a name, and no file; normal images have no mask.
            if not path or path in self._checked or not Path(path).is_file():
                continue
            with Image.open(path) as image:
                try:
                    # Whatever is above zero belongs to a mask, and stays so if it is grey.
                    if not (masks and image.mode.startswith("I")):
                        check_depth(image)
                    check_single(image)
                except ValueError as error:
                    msg = f"{path}: {error}."
                    raise ValueError(msg) from error
            self._checked.add(path)


def _leave_hidden_files_out(dataset: object) -> None:
    """Take files whose names begin with a dot out of one of anomalib's data sets, unless it holds nothing else.

    A Mac writes a ``._name.png``, which is no image, beside ``name.png`` on foreign disks and into archives.
    """
    files = image_files(dataset)
    shown = [index for index, file in enumerate(files) if not Path(file).name.startswith(".")]
    if len(shown) in {0, len(files)}:
        return
    if isinstance(dataset, PredictDataset):
        dataset.image_filenames = [dataset.image_filenames[index] for index in shown]
    elif isinstance(dataset, AnomalibDataset):
        dataset.subsample(shown, inplace=True)
    hidden = sorted({*files} - {files[index] for index in shown})
    more = ", ..." if len(hidden) > 5 else ""
    logger.warning("%d hidden files are left out: %s%s", len(hidden), ", ".join(hidden[:5]), more)


def _datasets(trainer: Trainer, stage: str) -> Iterator[object]:
    """Yield the data sets that are read at a stage, as far as data module or loaders tell them."""
    training = trainer.fit_loop
    loops: dict[str, list[tuple[Any, str]]] = {
        "fit": [(training, "train_data"), (training.epoch_loop.val_loop, "val_data")],
        "validate": [(trainer.validate_loop, "val_data")],
        "test": [(trainer.test_loop, "test_data")],
        "predict": [(trainer.predict_loop, "test_data")],
    }
    for loop, name in loops[stage]:
        # The loaders that a trainer shows are there only when they are already being read, and its data module may be
        # that of an earlier run.
        given = loop._data_source.instance
        if isinstance(given, AnomalibDataModule):
            yield getattr(given, name, None)
        else:
            yield from (getattr(loader, "dataset", None) for loader in (given if isinstance(given, list) else [given]))


def image_files(dataset: object) -> list[str]:
    """Return the paths of the images of one of anomalib's data sets; none of what is something else."""
    if isinstance(dataset, PredictDataset):
        return [*map(str, dataset.image_filenames)]
    return _column(dataset, "image_path")


def _mask_files(dataset: object) -> list[str]:
    return [file for file in _column(dataset, "mask_path") if file]


def _column(dataset: object, name: str) -> list[str]:
    return [*map(str, dataset.samples.get(name, ()))] if isinstance(dataset, AnomalibDataset) else []


def _damage(file: str) -> str | None:
    """Return what is wrong with a file that is there, or ``None``."""
    if not Path(file).is_file():
        return None
    try:
        with Image.open(file) as image:
            image.load()
    except READING_ERRORS as error:
        return str(error)
    return None
