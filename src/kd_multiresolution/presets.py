"""The paper's settings per data set, as data (Sec. 3.2 and 4 of arXiv 2011.11108, and its published code)."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Preset:
    """Settings of one data set.

    Attributes:
        data: name of the data module.
        image_size: height and width in pixels.
        value_weight: factor of the value term.
        epochs: the published code's number of epochs.
        imagenet_normalization: whether images are normalised with ImageNet's mean and deviation.
    """

    data: str
    image_size: tuple[int, int]
    value_weight: float
    epochs: int
    imagenet_normalization: bool = False


LEARNING_RATE = 1e-3
BATCH_SIZE = 64

# The published code names 51, 201 and 601 epochs; for the medical sets it has none, so MVTec AD's stands in.
PRESETS = MappingProxyType(
    {
        "mnist": Preset("OneClassMNIST", (32, 32), value_weight=0.01, epochs=51),
        "fashion_mnist": Preset("OneClassFashionMNIST", (32, 32), value_weight=0.01, epochs=51),
        "cifar10": Preset("OneClassCIFAR10", (224, 224), value_weight=0.01, epochs=201, imagenet_normalization=True),
        "mvtec": Preset("MVTecAD", (128, 128), value_weight=0.5, epochs=601),
        "retinal_oct": Preset("RetinalOCT", (128, 128), value_weight=0.01, epochs=601),
        "head_ct": Preset("HeadCT", (128, 128), value_weight=0.01, epochs=601),
        "brain_mri": Preset("BrainMRI", (128, 128), value_weight=0.01, epochs=601),
    }
)
