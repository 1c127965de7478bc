"""Names of the pictures of a run: anomalib's, unless two images would share one."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from anomalib.data import AnomalibDataModule, AnomalibDataset, PredictDataset
from anomalib.utils.path import generate_output_filename
from lightning.pytorch import Trainer

from kd_multiresolution.results.view import datasets


class PictureNames:
    """Names the pictures of a run by their images: folders and file, such as ``scratch/001.png``.

    anomalib keeps the folders below the one named after the data set, or else the last folder alone, so that
    ``line1/cam/001.png`` and ``line2/cam/001.png`` share a name. If any two images of the run do, all names are the
    paths below the folder that all images have in common. An image of which the run's data sets said nothing gets as
    many folders more as it takes.

    Args:
        paths: of all images of the run, as far as anomalib's data sets know them.
        data_name: name of the data module.
        category: its category.
    """

    def __init__(self, paths: Iterable[str] = (), data_name: str | None = None, category: str | None = None) -> None:
        self._data_name = data_name
        self._category = category
        self._names: dict[str, str] = {}  # by file
        files = sorted({_absolute(path) for path in paths})
        if len({self._anomalibs(file) for file in files}) < len(files) and len({Path(f).drive for f in files}) == 1:
            common = os.path.commonpath(files)
            self._names = {file: Path(file).relative_to(common).as_posix() for file in files}
        self._files = {name: file for file, name in self._names.items()}

    @classmethod
    def of_run(cls, trainer: Trainer) -> PictureNames:
        """Return the names of a test's or a prediction's pictures."""
        paths: list[str] = []
        for data in datasets(trainer):
            if isinstance(data, AnomalibDataset):
                paths.extend(data.samples["image_path"])
            elif isinstance(data, PredictDataset):
                paths.extend(map(str, data.image_filenames))
        loop = trainer.predict_loop if trainer.predicting else trainer.test_loop
        module = loop._data_source.instance  # trainer.datamodule may be that of an earlier run
        if not isinstance(module, AnomalibDataModule):
            return cls(paths)
        return cls(paths, module.name, getattr(module, "category", None))

    def __call__(self, path: str) -> str:
        """Return the name of an image's picture, the same however often it is asked for."""
        file = _absolute(path)
        if file not in self._names:
            name = self._anomalibs(file)
            parts = Path(file).parts[1:]
            while self._files.setdefault(name, file) != file:
                longer = "/".join(parts[-len(Path(name).parts) - 1 :])
                name = longer if longer != name else f"_{name}"
            self._names[file] = name
        return self._names[file]

    def _anomalibs(self, file: str) -> str:
        name = generate_output_filename(file, Path(), self._data_name, self._category, mkdir=False)
        return name.as_posix()


def _absolute(path: str) -> str:
    return os.path.abspath(path)  # noqa: PTH100 (a link keeps its name)
