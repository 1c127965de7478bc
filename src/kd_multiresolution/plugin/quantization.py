"""Post-training quantisation of an exported model: the source in INT8, all else in float32.

The score is a small difference of large activations, and a max pool's gradient hangs on which of two numbers is larger:
neither survives eight bits. The source's forward convolutions, where most of the work is, do.
"""

from __future__ import annotations

from typing import Any, cast

import torch.nn.functional as F  # noqa: N812
from anomalib.data import AnomalibDataModule, ImageBatch
from torch import Tensor

from kd_multiresolution.plugin.image_files import ImageFileCheck

SOURCE = "model.source."  # of the names of its weights in an exported model


def quantize_source(model: Any, datamodule: AnomalibDataModule) -> Any:
    """Return an OpenVINO model whose source computes its convolutions in INT8.

    Args:
        model: an ``openvino.Model``, as it was exported from a model of ours.
        datamodule: its training images calibrate the ranges; no validation or test image takes part.

    Raises:
        ValueError: if the model has no convolution of the source, or an image would be read wrongly.
    """
    import nncf  # comes with the extra "export"

    datamodule.setup("fit")
    ImageFileCheck().check_dataset(datamodule.train_data)
    height, width = (model.input(0).partial_shape[axis] for axis in (2, 3))

    def images(batch: ImageBatch) -> Any:
        pictures = cast("Tensor", batch.image).as_subclass(Tensor)
        if height.is_static:
            # Such a model takes images of one size only.
            size = (height.get_length(), width.get_length())
            pictures = F.interpolate(pictures, size=size, mode="bilinear", align_corners=False)
        return pictures.numpy()

    data = nncf.Dataset(datamodule.train_dataloader(), images)
    others = nncf.IgnoredScope(names=_all_but_source(model), validate=False)
    return nncf.quantize(model, data, ignored_scope=others)


def _all_but_source(model: Any) -> list[str]:
    """Return the names of all operations save the source's forward convolutions."""
    operations = [op for op in model.get_ops() if op.get_type_name() not in {"Constant", "Parameter", "Result"}]
    others = [op.get_friendly_name() for op in operations if not _is_source_convolution(op)]
    if len(others) == len(operations):
        msg = f"compression_type=INT8_PTQ: the exported model has no convolution with a weight named {SOURCE}*."
        raise ValueError(msg)
    return others


def _is_source_convolution(operation: Any) -> bool:
    if operation.get_type_name() not in {"Convolution", "GroupConvolution"}:
        return False
    # A backward convolution's weight is computed from the forward one's, and has another name.
    return bool(operation.input_value(1).get_node().get_friendly_name().startswith(SOURCE))
