"""Image files that cannot be read are named, and those that would be read wrongly are refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from anomalib.data import AnomalibDataModule, ImageBatch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image

# What PIL raises on damaged files, and on pictures too large for it.
READING_ERRORS = (OSError, SyntaxError, Image.DecompressionBombError)


def check_depth(image: Image.Image) -> None:
    """Check that an opened image has eight bits per channel, or one.

    The conversion to RGB, ours and anomalib's, would clip all deeper values to white without a word.

    Raises:
        ValueError: if it has more.
    """
    if image.mode.startswith(("I", "F")):
        msg = f"mode {image.mode}: expected eight bits per channel; convert it with the scale that suits your camera"
        raise ValueError(msg)


class ImageFileCheck(Callback):
    """Refuses files of more than eight bits per channel, and names the file when reading one has failed.

    anomalib's data modules do neither. Each file's header is looked at once.
    """

    def __init__(self) -> None:
        self._checked: set[str] = set()

    def _on_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        del trainer, pl_module, args, kwargs
        self._check(batch)

    on_train_batch_start = on_validation_batch_start = on_test_batch_start = on_predict_batch_start = _on_batch_start

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put the name of the first unreadable file into an error that came from reading one."""
        del pl_module
        # Errors of the operating system have a number; they are about full disks and the like.
        if not isinstance(exception, READING_ERRORS) or getattr(exception, "errno", None) is not None:
            return
        files = [*_files(trainer)]
        if any(file in str(exception) for file in files):
            return
        for file in files:
            if why := _damage(file):
                exception.args = (
                    f"{file}: not a readable image ({why}). Replace the file, or take it out of the folder.",
                )
                return

    def _check(self, batch: ImageBatch) -> None:
        for path in batch.image_path or ():
            if path in self._checked or not Path(path).is_file():  # images in memory have a name, and no file
                continue
            with Image.open(path) as image:
                try:
                    check_depth(image)
                except ValueError as error:
                    msg = f"{path}: {error}."
                    raise ValueError(msg) from error
            self._checked.add(path)


def _files(trainer: Trainer) -> Iterator[str]:
    """Yield the images and masks of a run, as far as anomalib's data tell them."""
    data = getattr(trainer, "datamodule", None)
    if isinstance(data, AnomalibDataModule):
        for name in ("train_data", "val_data", "test_data"):
            samples = getattr(data, name).samples if hasattr(data, name) else {}
            for column in ("image_path", "mask_path"):
                yield from (file for file in samples.get(column, ()) if isinstance(file, str) and file)
    loaders = trainer.predict_dataloaders or ()
    for loader in loaders if isinstance(loaders, list) else [loaders]:
        yield from map(str, getattr(getattr(loader, "dataset", None), "image_filenames", ()))


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
