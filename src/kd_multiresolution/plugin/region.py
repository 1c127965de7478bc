"""The region of interest of a model: read from a mask, held against the files, and what is marked cut to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from anomalib.data import InferenceBatch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import Transform

WHITE = 128  # of 255, from which a pixel of the mask is judged


def read_region(path: str | Path, transform: Transform | None) -> tuple[Tensor, tuple[int, int]]:
    """Read a mask of what is to be judged, drawn on an image file.

    Args:
        path: a picture of the size of the image files; white is judged, black is not.
        transform: what images go through, to the model's size.

    Returns:
        The region at the model's size, (1, 1, H, W), bool, and height and width of the mask.

    Raises:
        ValueError: if it cannot be read, or nothing is to be judged.
    """
    try:
        with Image.open(path) as picture:
            judged = np.asarray(picture.convert("L")) >= WHITE
    except (OSError, SyntaxError) as error:
        msg = f"region={str(path)!r}: not a readable image ({error}). Draw a mask, white where images are judged."
        raise ValueError(msg) from error
    mask = tv_tensors.Mask(torch.from_numpy(judged.astype(np.uint8))[None])
    seen = (mask if transform is None else transform(mask)).as_subclass(Tensor).bool()[None]
    if not bool(seen.any()):
        msg = f"region={str(path)!r}: nothing is white at the model's size, so nothing would be judged."
        raise ValueError(msg)
    return seen, (judged.shape[0], judged.shape[1])


class RegionOfInterest(Callback):
    """Refuses image files of another size than the mask, and marks nothing outside it.

    It stands behind the post-processor, which a sensitivity may have mark what is zero.
    """

    def __init__(self) -> None:
        self._checked: set[str] = set()

    def _on_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        del trainer, args, kwargs
        size = getattr(pl_module, "region_size", None)  # another model in the same trainer has none
        if size is None:
            return
        for path in getattr(batch, "image_path", None) or ():
            if path in self._checked or not Path(path).is_file():  # images in memory have a name, and no file
                continue
            with Image.open(path) as image:
                if (image.height, image.width) != tuple(size):
                    msg = (
                        f"{path}: {image.width} x {image.height} pixels; expected {size[1]} x {size[0]}, the size of "
                        "the region's mask, which is drawn on such a file. Give images of one camera."
                    )
                    raise ValueError(msg)
            self._checked.add(path)

    on_train_batch_start = on_validation_batch_start = on_test_batch_start = on_predict_batch_start = _on_batch_start

    def _on_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        del trainer, args, kwargs
        if getattr(pl_module, "region_size", None) is None:
            return
        if outputs.pred_mask is not None and (region := cast("Any", pl_module).model.source.region) is not None:
            outputs.pred_mask = _cut(outputs.pred_mask, region.reshape(region.shape[-2:]))

    on_test_batch_end = on_predict_batch_end = _on_batch_end


def marked_within(predictions: InferenceBatch, region: Tensor | None) -> InferenceBatch:
    """Return predictions with masks, (N, 1, H, W), cut to a region, if there is one."""
    if region is None or predictions.pred_mask is None:
        return predictions
    return predictions._replace(pred_mask=_cut(predictions.pred_mask, region))


def _cut(masks: Tensor, region: Tensor) -> Tensor:
    # Post-processors give masks of several types; ONNX Runtime has no selection of booleans.
    return masks & region if masks.dtype == torch.bool else masks * region.to(masks.dtype)
