"""The paper's settings per data set, as data (Sec. 3.2 and 4 of arXiv 2011.11108, and its published code).

The model's defaults are those of MVTec AD. The files in ``configs/`` are written from this table by
``benchmarks/write_configs.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True)
class Preset:
    """Settings of one data set.

    Attributes:
        data: name of anomalib's or our data module.
        data_arguments: its arguments, beside the batch size.
        image_size: height and width in pixels.
        value_weight: factor of the value term.
        epochs: the published code's fixed number of epochs; ``None`` where it names none.
        imagenet_normalization: whether images are normalised as the source was trained.
        resize: size to which images are resized before ``image_size`` is cut out of their centre; ``None``: no cut.
    """

    data: str
    image_size: tuple[int, int]
    value_weight: float
    epochs: int | None = None
    data_arguments: Mapping[str, object] = field(default_factory=dict)
    imagenet_normalization: bool = False
    resize: tuple[int, int] | None = None


LEARNING_RATE = 1e-3
BATCH_SIZE = 64

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "mnist": Preset("OneClassMNIST", (32, 32), value_weight=0.01, epochs=51, data_arguments={"normal_class": 3}),
        "fashion_mnist": Preset(
            "OneClassFashionMNIST", (32, 32), value_weight=0.01, epochs=51, data_arguments={"normal_class": 0}
        ),
        "cifar10": Preset(
            "OneClassCIFAR10",
            (224, 224),
            value_weight=0.01,
            epochs=201,
            data_arguments={"normal_class": "airplane"},
            imagenet_normalization=True,
            resize=(256, 256),
        ),
        "mvtec": Preset("MVTecAD", (128, 128), value_weight=0.5, epochs=601, data_arguments={"category": "bottle"}),
        "retinal_oct": Preset("RetinalOCT", (128, 128), value_weight=0.01),
        "head_ct": Preset("HeadCT", (128, 128), value_weight=0.01),
        "brain_mri": Preset("BrainMRI", (128, 128), value_weight=0.01),
    }
)
