"""What a model saw of an image file: which part of it, in the file's own proportions."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from anomalib.data import AnomalibDataset, PredictDataset
from anomalib.data.utils import read_image
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Trainer
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import Compose, Normalize
from torchvision.transforms.v2.functional import to_pil_image

logger = logging.getLogger(__name__)

# Largest mean difference between what a file gives and what the model was given: rounding, half precision.
TOLERANCE = 2 / 255
ROUNDING = 1e-2  # of coordinates
TRIM = 2  # pixels: at a border, coordinates do not go on as they did
LEAST = 6  # pixels in which a line of coordinates is recognised


class Box(NamedTuple):
    """A part of a file, in its pixels; what is outside the file is padding."""

    left: float
    top: float
    right: float
    bottom: float


class Frame(NamedTuple):
    """What a model saw of an image.

    Attributes:
        seen: as the model was given it, without its normalisation: (3, H, W), in [0, 1].
        file: its file, (3, H, W), in [0, 1], if it is known which part of it that is.
        box: this part.
    """

    seen: Tensor
    file: Tensor | None = None
    box: Box | None = None

    def picture(self, size: tuple[int, int] | None) -> Image.Image:
        """Return the picture in its own proportions.

        Args:
            size: a width and a height: it has as many pixels; ``None``: as many as the file has of it, or the model if
                that is not known.
        """
        picture: Image.Image = to_pil_image(self.seen)
        proportions = picture.width / picture.height
        if self.file is not None and (box := self.box) is not None:
            sides = box.right - box.left, box.bottom - box.top
            proportions, size = sides[0] / sides[1], size or (round(sides[0]), round(sides[1]))
            if min(box) >= 0 and box.right <= self.file.shape[-1] and box.bottom <= self.file.shape[-2]:
                whole: Image.Image = to_pil_image(self.file)
                return whole.resize(_sides(size, proportions), box=box)
        return picture.resize(_sides(size or picture.size, proportions))


class ModelView:
    """Shows the part of an image file that a model saw, in the file's proportions and as sharp as the file has it.

    What an image goes through is applied to the file again, and to the coordinates of its pixels. If the file then
    gives what the model was given, and its rows and columns are still rows and columns, the coordinates say which part
    it is. If not (a random crop, a rotation, transforms that are not known), the picture is what the model was given,
    at its size and in its proportions, and the log says so. What is partly padding is shown so, too.

    Args:
        transforms: what an image goes through, in that order. Pictures do without torchvision's ``Normalize``; what
            else changes the values of pixels changes coordinates as well, so that they say nothing.
    """

    def __init__(self, transforms: Iterable[Any] = ()) -> None:
        parts = [part for transform in transforms for part in _parts(transform)]
        self._normalizations = [part for part in parts if isinstance(part, Normalize)]
        self._transforms = [part for part in parts if not isinstance(part, Normalize)]
        self._boxes: dict[tuple[int, int], Box | None] = {}  # by height and width of the file
        self._said = False

    @classmethod
    def of_run(cls, trainer: Trainer, pre_processor: object) -> ModelView:
        """Return the view of a test or a prediction: the data set's transforms, then the pre-processor's."""
        data = next(datasets(trainer), None)
        transforms = [
            data.augmentations if isinstance(data, AnomalibDataset) else None,
            data.transform if isinstance(data, PredictDataset) else None,
            pre_processor.transform if isinstance(pre_processor, PreProcessor) else None,
        ]
        return cls(transform for transform in transforms if transform is not None)

    def seen(self, image: Tensor) -> Tensor:
        """Return an image as the model was given it, without its normalisation: (3, H, W), in [0, 1]."""
        image = image.detach().as_subclass(Tensor).float().cpu()
        for step in reversed(self._normalizations):
            mean, deviation = (torch.tensor([*values]).reshape(-1, 1, 1) for values in (step.mean, step.std))
            image = image * deviation + mean
        low, high = image.min(), image.max()
        if low < -TOLERANCE or high > 1 + TOLERANCE:  # another normalisation, which is not known
            image = (image - low) / (high - low).clamp_min(torch.finfo(image.dtype).tiny)
        return image.clamp(0, 1)

    def frame(self, image: Tensor, path: str | None) -> Frame:
        """Return what the model saw of an image.

        Args:
            image: as the model was given it, (3, H, W).
            path: its file, if there is one.
        """
        seen = self.seen(image)
        if path is not None and Path(path).is_file():
            file = cast("Tensor", read_image(path, as_tensor=True))
            if box := self._box(seen, file, path):
                return Frame(seen, file, box)
        return Frame(seen)

    def picture(self, image: Tensor, path: str | None, size: tuple[int, int] | None) -> Image.Image:
        """Return the picture of an image.

        Args:
            image: as the model was given it, (3, H, W).
            path: its file, if there is one.
            size: a width and a height: the picture has as many pixels, in its own proportions; ``None``: as many as the
                file has of it, or the model if that is not known.
        """
        return self.frame(image, path).picture(size)

    def _box(self, seen: Tensor, file: Tensor, path: str) -> Box | None:
        again = self._transformed(file)
        box = None
        if again.shape == seen.shape and (again - seen).abs().mean() <= TOLERANCE:
            size = (file.shape[-2], file.shape[-1])
            if size not in self._boxes:
                self._boxes[size] = self._part_of(*size)
            box = self._boxes[size]
        if box is None and not self._said:
            self._said = True
            logger.warning(
                "Pictures show images as the model was given them, %d x %d pixels, and not their files: which part of "
                "a file that is cannot be told (%s, for one).",
                *seen.shape[-2:],
                path,
            )
        return box

    def _part_of(self, height: int, width: int) -> Box | None:
        """Return the part of a file of this size, or ``None`` if its rows and columns are none to the model."""
        # From 1 on: 0 is padding.
        columns = self._transformed((torch.arange(width) + 1.0).expand(3, height, width))[0]
        rows = self._transformed((torch.arange(height) + 1.0)[:, None].expand(3, height, width))[0]
        across, down = _line(columns, width), _line(rows.T, height)
        if across is None or down is None:
            return None
        return Box(across[0], down[0], across[1], down[1])

    def _transformed(self, image: Tensor) -> Tensor:
        image = tv_tensors.Image(image)
        with torch.random.fork_rng(devices=[]):  # a random transform must not change what comes after it
            for transform in self._transforms:
                image = transform(image)
        return image.as_subclass(Tensor)


def datasets(trainer: Trainer) -> Iterator[Any]:
    """Yield the data sets of a test or a prediction."""
    loaders = trainer.predict_dataloaders if trainer.predicting else trainer.test_dataloaders
    for loader in loaders if isinstance(loaders, (list, tuple)) else [loaders]:
        if (data := getattr(loader, "dataset", None)) is not None:
            yield data


def _parts(transform: Any) -> Iterator[Any]:
    if isinstance(transform, Compose):
        for part in transform.transforms:
            yield from _parts(part)
    else:
        yield transform


def _line(plane: Tensor, count: int) -> tuple[float, float] | None:
    """Return where a file's ``count`` pixels lie that a model sees from its first to its last, in the file's pixels.

    Args:
        plane: the coordinates that are left, (lines, positions).
        count: how many there were.

    Returns:
        begin and end; ``None`` if coordinates do not grow evenly, by the same in each line.
    """
    # Padding is 0, or repeats the border, as an enlarged image does.
    inside = (plane > 1 + ROUNDING) & (plane < count - ROUNDING)
    line, position = (inside.any(dim).nonzero().flatten()[TRIM:-TRIM] for dim in (1, 0))
    if min(len(line), len(position)) < LEAST:
        return None
    values = plane[line[0] : line[-1] + 1, position[0] : position[-1] + 1]
    step = float(values[0, -1] - values[0, 0]) / (len(position) - 1)
    even = float(values[0, 0]) + step * torch.arange(len(position))
    if step <= 0 or (values - even).abs().max() > 1 + step / 4:
        return None
    # The first pixel's middle is at 1, a model's pixel begins half a step before its own.
    begin = float(values[0, 0]) - 1 / 2 - step * (int(position[0]) + 1 / 2)
    end = begin + step * plane.shape[1]
    # Half a step more or less is rounding.
    return 0.0 if abs(begin) < step / 2 else begin, float(count) if abs(end - count) < step / 2 else end


def _sides(size: tuple[int, int], proportions: float) -> tuple[int, int]:
    """Return width and height, in some proportions, of a picture with about as many pixels as one of a given size."""
    width = math.sqrt(size[0] * size[1] * proportions)
    return max(1, round(width)), max(1, round(width / proportions))
