"""What is marked in an image: how large it is, where it is, its outline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch.nn.functional as F  # noqa: N812
from scipy import ndimage
from skimage.measure import approximate_polygon, find_contours
from torch import Tensor

if TYPE_CHECKING:
    from kd_multiresolution.results.view import Frame

_contours, _simplified = cast("Any", find_contours), cast("Any", approximate_polygon)  # scikit-image has no types

BORDER = 0.5  # of what is marked
MOST_BOXES = 100  # of an image whose map is noise; a cell of a spreadsheet has an end
OUTLINE_SIDE = 96  # positions per side at most
OUTLINE_ROUNDING = 0.35  # positions
OUTLINE_LENGTH = 1500  # characters


@dataclass(frozen=True)
class Marked:
    """What is marked in an image.

    Attributes:
        width: of the frame in which it is measured, in pixels.
        height: of this frame.
        of_file: whether the frame is the image's file, or else what the model was given.
        area: pixels that are marked.
        boxes: left, top, right and bottom of each connected region, the largest region first, at most 100.
        regions: how many there are.
    """

    width: int
    height: int
    of_file: bool
    area: int
    boxes: tuple[tuple[int, int, int, int], ...]
    regions: int

    @classmethod
    def of(cls, marks: Tensor, frame: Frame) -> Marked:
        """Return the measures of what is marked.

        Args:
            marks: (H, W), bool or in [0, 1]; what lies above 0.5 is marked.
            frame: what the model saw; the measures are those of the file if it is known which part of it that is.
        """
        inside = (marks.float() > BORDER).numpy()
        rows, columns = inside.shape
        height, width = frame.seen.shape[-2:]
        left, top, right, bottom = 0.0, 0.0, float(width), float(height)
        if frame.file is not None and frame.box is not None:
            height, width = frame.file.shape[-2:]
            left, top, right, bottom = frame.box
        across, down = (right - left) / columns, (bottom - top) / rows
        labels, regions = ndimage.label(inside, np.ones((3, 3)))
        sizes = np.bincount(labels.ravel())[1:]
        places = ndimage.find_objects(labels)
        boxes = []
        for index in np.argsort(-sizes, kind="stable")[:MOST_BOXES]:
            y, x = places[index]
            corners = (left + x.start * across, top + y.start * down, left + x.stop * across, top + y.stop * down)
            # Padding is not of the file.
            limits = (width, height, width, height)
            boxes.append(tuple(min(max(round(at), 0), end) for at, end in zip(corners, limits, strict=True)))
        area = round(int(inside.sum()) * across * down)
        return cls(width, height, frame.file is not None, area, tuple(boxes), int(regions))


def outline(marks: Tensor) -> str:
    """Return the outline of what is marked as an SVG path whose x and y go from 0 to 1000.

    Args:
        marks: (H, W), bool or in [0, 1]; what lies above 0.5 is marked.
    """
    if not (marks > BORDER).any():
        return ""
    values = marks.float()[None, None]
    size = [min(side, OUTLINE_SIDE) for side in values.shape[-2:]]
    # The largest value of each part: a speck stays.
    plane = np.pad(F.adaptive_max_pool2d(values, size)[0, 0].numpy(), 1)
    rows, columns = size
    path = ""
    for contour in sorted(_contours(plane, BORDER + 1e-6), key=len, reverse=True):
        points = _simplified(contour, OUTLINE_ROUNDING)
        # A position's middle is at half, and the border is one wide.
        xs = np.clip((points[:, 1] - 0.5) * 1000 / columns, 0, 1000).round().astype(int)
        ys = np.clip((points[:, 0] - 0.5) * 1000 / rows, 0, 1000).round().astype(int)
        part = "M" + "L".join(f"{x} {y}" for x, y in zip(xs, ys, strict=True)) + "Z"
        if len(path) + len(part) > OUTLINE_LENGTH:
            break
        path += part
    return path
