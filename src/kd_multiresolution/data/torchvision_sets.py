"""MNIST, Fashion-MNIST and CIFAR-10 as one-class tasks, Table 2 of arXiv 2011.11108."""

from __future__ import annotations

import gzip
import math
import pickle
import zlib
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import CIFAR10, MNIST, FashionMNIST

from kd_multiresolution.data.one_class_memory import Labelled, OneClassMemory


class _IdxFiles(OneClassMemory):
    """Base of the data sets in MNIST's file format."""

    # torchvision's class: it downloads. Its reader is not used: it wants the files unpacked beside the archives, which
    # a read-only folder does not allow.
    torchvision_class: ClassVar[type[MNIST]]

    @property
    def _folder(self) -> Path:
        return self.root / self.torchvision_class.__name__ / "raw"

    def _find(self, stem: str) -> Path | None:
        """Return the file, packed if there is a choice: a packed one carries a checksum."""
        candidates = (self._folder / f"{stem}.gz", self._folder / stem)
        return next((path for path in candidates if path.is_file()), None)

    def _is_on_disk(self) -> bool:
        return all(self._find(name.removesuffix(".gz")) for name, _ in self.torchvision_class.resources)

    def _download(self) -> None:
        self.torchvision_class(self.root, download=True)

    def _load(self, *, train: bool) -> Labelled:
        prefix = "train" if train else "t10k"
        images_file, labels_file = self._find(f"{prefix}-images-idx3-ubyte"), self._find(f"{prefix}-labels-idx1-ubyte")
        if images_file is None or labels_file is None:
            msg = f"{self._folder}: {prefix} images or labels are missing. {self.source}"
            raise FileNotFoundError(msg)
        images, labels = read_idx(images_file, 3), read_idx(labels_file, 1)
        if len(images) != len(labels):
            msg = f"{images_file} holds {len(images)} images, {labels_file} {len(labels)} labels. {self.source}"
            raise OSError(msg)
        return Labelled(images.unsqueeze(1), labels.long())


class OneClassMNIST(_IdxFiles):
    """One digit of MNIST is normal, the nine others are anomalous; arguments as in :class:`OneClassMemory`.

    Reads ``MNIST/raw/*.gz`` (or the unpacked files) below the root.

    Example:
        >>> datamodule = OneClassMNIST(root="datasets", normal_class=3)
        >>> datamodule.category
        'three'
    """

    torchvision_class = MNIST
    class_names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    source = (
        "Expected MNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz below it: "
        "https://ossci-datasets.s3.amazonaws.com/mnist/"
    )


class OneClassFashionMNIST(_IdxFiles):
    """One kind of clothing is normal, the nine others are anomalous; arguments as in :class:`OneClassMemory`.

    Reads ``FashionMNIST/raw/*.gz`` (or the unpacked files) below the root.

    Example:
        >>> datamodule = OneClassFashionMNIST(root="datasets", normal_class="Ankle boot")
        >>> datamodule.normal_class
        9
    """

    torchvision_class = FashionMNIST
    class_names = (
        "t-shirt_top",
        "trouser",
        "pullover",
        "dress",
        "coat",
        "sandal",
        "shirt",
        "sneaker",
        "bag",
        "ankle_boot",
    )
    source = (
        "Expected FashionMNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz below it: "
        "https://github.com/zalandoresearch/fashion-mnist"
    )


class OneClassCIFAR10(OneClassMemory):
    """One class of CIFAR-10 is normal, the nine others are anomalous; arguments as in :class:`OneClassMemory`.

    Reads ``cifar-10-batches-py`` below the root.

    Example:
        >>> datamodule = OneClassCIFAR10(root="datasets", normal_class="cat")
        >>> datamodule.normal_class
        3
    """

    class_names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    source = "Expected cifar-10-batches-py/ below it: https://www.cs.toronto.edu/~kriz/cifar.html"

    def _is_on_disk(self) -> bool:
        folder = self.root / CIFAR10.base_folder
        names = [name for name, _ in (*CIFAR10.train_list, *CIFAR10.test_list)]
        return all((folder / name).is_file() for name in (*names, CIFAR10.meta["filename"]))

    def _download(self) -> None:
        CIFAR10(str(self.root), download=True)

    def _load(self, *, train: bool) -> Labelled:
        try:
            data = CIFAR10(str(self.root), train=train)
        except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
            msg = f"{self.root / CIFAR10.base_folder}: damaged files ({error}). {self.source}"
            raise OSError(msg) from error
        return Labelled(torch.from_numpy(data.data).permute(0, 3, 1, 2), torch.tensor(data.targets))


def read_idx(path: Path, dimensions: int) -> Tensor:
    """Read a file of MNIST's format, packed (``.gz``) or not, without writing anything.

    Args:
        path: a file of unsigned bytes.
        dimensions: the number of dimensions it must have.

    Returns:
        uint8, of the shape in the file's header.

    Raises:
        OSError: if the file is damaged or something else; the message names it.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        msg = f"{path}: damaged archive ({error}). Delete it and download it again."
        raise OSError(msg) from error
    header = 4 + 4 * dimensions
    if data[:4] != bytes((0, 0, 8, dimensions)) or len(data) < header:
        msg = f"{path}: not an idx file of unsigned bytes in {dimensions} dimensions. Delete it and download it again."
        raise OSError(msg)
    shape = tuple(np.frombuffer(data, ">u4", dimensions, 4).tolist())
    if len(data) != header + math.prod(shape):
        msg = f"{path}: cut off or too long for the shape {shape}. Delete it and download it again."
        raise OSError(msg)
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=header).reshape(shape).copy())
