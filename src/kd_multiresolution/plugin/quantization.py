"""Post-training quantisation of an exported model: what of the source can be had in INT8, all else in float32.

The score is a small difference of large activations, and a max pool's gradient hangs on which of two numbers is larger:
neither survives eight bits. The source's forward convolutions, where most of the work is, may; the dual model compares
what its first ones give with predictions of it, and there only the last ones do. So it is tried.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch.nn.functional as F  # noqa: N812
from anomalib.data import AnomalibDataModule, ImageBatch
from anomalib.models.components import AnomalibModule
from torch import Tensor

from kd_multiresolution.plugin.export_check import FLOAT32, Array, compared, in_torch, open_vino
from kd_multiresolution.plugin.image_files import ImageFileCheck

SOURCE = "model.source."  # of the names of its weights in an exported model
IMAGES = 8  # to hold a quantised model against torch on
BOUND = 0.05  # of the deviation of a score, as :mod:`kd_multiresolution.plugin.export_check` has it
LEAST_CORRELATION = 0.99  # of a map

logger = logging.getLogger(__name__)


def quantize_source(exported: Any, datamodule: AnomalibDataModule | None, model: AnomalibModule) -> Any:
    """Return an OpenVINO model whose source computes its convolutions in INT8, as many of the last ones as can be.

    All are tried, then the last half of them, and so on, until training images have nearly the scores and maps that
    they have in torch.

    Args:
        exported: an ``openvino.Model``, as it was exported from a model of ours.
        datamodule: its training images calibrate the ranges; no validation or test image takes part.
        model: what was exported.

    Raises:
        ValueError: if there is no data module, an image would be read wrongly, the model has no convolution of the
            source, or none of them can be had in INT8.
    """
    if datamodule is None:
        # anomalib's words, and what for.
        msg = "Datamodule must be provided for OpenVINO INT8_PTQ compression: its training images calibrate it."
        raise ValueError(msg)
    import nncf  # comes with the extra "export"

    datamodule.setup("fit")
    ImageFileCheck().check_dataset(datamodule.train_data)
    convolutions = source_convolutions(exported)
    if not convolutions:
        msg = f"compression_type=INT8_PTQ: the exported model has no convolution with a weight named {SOURCE}*."
        raise ValueError(msg)
    size = _size(exported)
    data = nncf.Dataset(datamodule.train_dataloader(), lambda batch: _pixels(batch, size))
    images = training_images(datamodule, size)
    expected = [in_torch(model, image) for image in images]
    count = len(convolutions)
    while count:
        others = nncf.IgnoredScope(names=all_but(exported, convolutions[-count:]), validate=False)
        quantized = nncf.quantize(exported, data, ignored_scope=others)
        run = open_vino(quantized, FLOAT32)
        found = compared(model, [run(image) for image in images], expected)
        correlation = 1.0 if found["least_correlation"] is None else found["least_correlation"]
        holds = found["deviation"] <= BOUND and correlation >= LEAST_CORRELATION
        logger.info(
            "INT8_PTQ: the last %d of the source's %d convolutions move a score at the threshold by up to %.4f, maps "
            "correlate by %.4f or more: %s.",
            count, len(convolutions), found["deviation"], correlation, "taken" if holds else "too much",
        )  # fmt: skip
        if holds:
            return quantized
        count //= 2
    msg = (
        "compression_type=INT8_PTQ: not one of the source's convolutions keeps score and map in INT8 "
        f"(deviation {BOUND}, correlation {LEAST_CORRELATION}). Use compression_type=FP16."
    )
    raise ValueError(msg)


def source_convolutions(exported: Any) -> list[str]:
    """Return the names of the source's forward convolutions in an OpenVINO model, in the order of computation."""
    return [op.get_friendly_name() for op in exported.get_ordered_ops() if _is_source_convolution(op)]


def all_but(exported: Any, names: Sequence[str]) -> list[str]:
    """Return the names of all operations but some."""
    operations = [op for op in exported.get_ops() if op.get_type_name() not in {"Constant", "Parameter", "Result"}]
    return [op.get_friendly_name() for op in operations if op.get_friendly_name() not in {*names}]


def training_images(datamodule: AnomalibDataModule, size: tuple[int, int] | None) -> list[Array]:
    """Return the first training images, (1, 3, H, W) in [0, 1], or fewer if there are not so many."""
    dataset = datamodule.train_data
    return [_pixels(dataset.collate_fn([dataset[index]]), size) for index in range(min(IMAGES, len(dataset)))]


def _size(exported: Any) -> tuple[int, int] | None:
    height, width = (exported.input(0).partial_shape[axis] for axis in (2, 3))
    return (height.get_length(), width.get_length()) if height.is_static else None


def _pixels(batch: ImageBatch, size: tuple[int, int] | None) -> Array:
    pictures = cast("Tensor", batch.image).as_subclass(Tensor)
    if size is not None:  # such a model takes images of one size only
        pictures = F.interpolate(pictures, size=size, mode="bilinear", align_corners=False)
    return np.ascontiguousarray(pictures)


def _is_source_convolution(operation: Any) -> bool:
    if operation.get_type_name() not in {"Convolution", "GroupConvolution"}:
        return False
    # A backward convolution's weight is computed from the forward one's, and has another name.
    return bool(operation.input_value(1).get_node().get_friendly_name().startswith(SOURCE))
