"""Base of the one-class tasks whose images are served from memory."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from urllib.error import URLError

import torch
from anomalib.data.utils import Split
from anomalib.visualization.base import Visualizer
from lightning.pytorch import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from kd_multiresolution.data.arguments import check_data_arguments
from kd_multiresolution.data.base import OneClassDataModule, digest, find_class, report_equal, sample_rows
from kd_multiresolution.data.memory import MemoryImages, Pixels, SampledVisualizer


class Labelled(NamedTuple):
    """Images, uint8, (N, 1 or 3, H, W), and their class numbers, (N,)."""

    images: Tensor
    labels: Tensor


class OneClassMemory(OneClassDataModule):
    """One class of the training set is normal; the whole test set is the test set.

    The validation set is by default the test set, so that both stay whole; thresholds then come from test labels, as
    with anomalib's ``MVTecAD``. ``from_train`` keeps them honest at the cost of training images.
    """

    train_data: MemoryImages
    test_data: MemoryImages

    class_names: ClassVar[tuple[str, ...]]
    # Where to get the files by hand.
    source: ClassVar[str]
    refused_split_modes: ClassVar[dict[str, str]] = {
        "from_dir": "has no validation set of its own",
        "synthetic": "serves its images from memory, and anomalib's synthetic anomalies are made from files",
    }

    def __init__(
        self,
        root: Path | str = "./datasets",
        normal_class: int | str = 0,
        pictures_per_class: int = 10,
        *,
        num_workers: int = 0,
        **kwargs: Any,
    ) -> None:
        """Keep the settings; nothing is read before :meth:`setup`.

        Args:
            root: the folder torchvision keeps its data sets in; what is missing is downloaded to it.
            normal_class: name of the normal class, or its number.
            pictures_per_class: how many test images of each class a visualizer draws; 0 for none.
            num_workers: loader processes; 0 reads in the main process, 10,000 images in about a second.
            **kwargs: the arguments of :class:`CheckedDataModule`; no split mode is ``synthetic``, and
                ``val_split_mode`` not ``from_dir``.

        Raises:
            TypeError: if an argument has another type.
            ValueError: if the class does not exist, a split mode needs files, or an argument is out of range.
            FileNotFoundError: on setup, if the data are absent.
            OSError: on setup, if a file is damaged.
            RuntimeError: while preparing the data, if they cannot be downloaded.
        """
        check_data_arguments(OneClassMemory.__init__, locals())
        super().__init__(num_workers=num_workers, **kwargs)
        self.root = Path(root)
        self.normal_class = find_class(normal_class, self.class_names)
        self.category = self.class_names[self.normal_class]
        self.pictures_per_class = pictures_per_class

    @abstractmethod
    def _is_on_disk(self) -> bool:
        """Return whether all files are there."""

    @abstractmethod
    def _download(self) -> None:
        """Have torchvision download what is missing."""

    @abstractmethod
    def _load(self, *, train: bool) -> Labelled:
        """Read one half of the data."""

    def prepare_data(self) -> None:
        """Download the data unless they are on disk; a Trainer calls it.

        Raises:
            RuntimeError: if that fails; the message says where to get the files by hand.
        """
        if self._is_on_disk():
            return
        try:
            self._download()
        except (RuntimeError, URLError, OSError) as error:
            msg = f"root={str(self.root)!r}: the data are not there, and the download failed ({error}). {self.source}"
            raise RuntimeError(msg) from error

    def _setup(self, _stage: str | None = None) -> None:
        if not self._is_on_disk():
            msg = f"root={str(self.root)!r}: files are missing. prepare_data() downloads them. {self.source}"
            raise FileNotFoundError(msg)
        train, test = self._load(train=True), self._load(train=False)
        chosen = (train.labels == self.normal_class).nonzero().flatten()
        for name, count in (("training", len(chosen)), ("test", int((test.labels == self.normal_class).sum()))):
            if count == 0:
                msg = f"root={str(self.root)!r}: no {name} image of class {self.category!r}. {self.source}"
                raise FileNotFoundError(msg)
        # Nine tenths of the training set are of no use and are let go.
        pixels = Pixels(torch.cat([train.images[chosen], test.images]))
        self.train_data = self._dataset(pixels, train.labels[chosen], chosen, 0, Split.TRAIN)
        self.test_data = self._dataset(pixels, test.labels, torch.arange(len(test.labels)), len(chosen), Split.TEST)
        parts = ((self.train_data, train.images[chosen]), (self.test_data, test.images))
        digests = (
            {path: digest(image.tobytes()) for path, image in zip(data.samples.image_path, images.numpy(), strict=True)}
            for data, images in parts
        )
        report_equal(*digests, count=len(test.labels))

    def _dataset(self, pixels: Pixels, labels: Tensor, numbers: Tensor, offset: int, split: Split) -> MemoryImages:
        """Return a split: images from ``offset`` on, named by class and number in the original order."""
        names = [self.class_names[label] for label in labels.tolist()]
        folder = f"{self.name}/{self.category}/{split.value}"
        paths = [f"{folder}/{name}/{number:05d}.png" for name, number in zip(names, numbers.tolist(), strict=True)]
        rows = sample_rows(paths, names, self.category, split)
        rows["position"] = range(offset, offset + len(rows))
        return MemoryImages(rows, pixels)

    def setup(self, stage: str | None = None) -> None:
        """Load the data and, for a test or a prediction, stand in for the visualizer; a Trainer calls it."""
        super().setup(stage)
        self._restore_visualizers()
        if stage not in (TrainerFn.TESTING, TrainerFn.PREDICTING):
            return
        drawn = self.test_data.samples.groupby("class_name").head(self.pictures_per_class).index
        images = {self.test_data.field(index, "image_path"): self.test_data.raw(index) for index in drawn}
        callbacks = self._callbacks()
        for position, callback in enumerate(callbacks):
            if isinstance(callback, Visualizer):
                callbacks[position] = SampledVisualizer(callback, images)

    def teardown(self, stage: str) -> None:
        """Put the visualizer back; a Trainer calls it."""
        super().teardown(stage)
        self._restore_visualizers()

    def on_exception(self, exception: BaseException) -> None:
        """Put the visualizer back after a failed run; a Trainer calls it."""
        super().on_exception(exception)
        self._restore_visualizers()

    def _restore_visualizers(self) -> None:
        callbacks = self._callbacks()
        for position, callback in enumerate(callbacks):
            if isinstance(callback, SampledVisualizer):
                callbacks[position] = callback.visualizer

    def _callbacks(self) -> list[Callback]:
        """Return the Trainer's own list; an empty one without a Trainer."""
        callbacks: list[Callback] = getattr(self.trainer, "callbacks", [])
        return callbacks
