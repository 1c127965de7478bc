"""The source's features of images, computed once.

The source is frozen: without augmentation its features of an image are the same in every epoch, and only the cloner is
left to compute. A cache lives as long as one fit and knows images by their path alone, so it is only made for data
whose images do not change: see :func:`changing_part`.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from anomalib.data.transforms import ExportableCenterCrop, SquarePad
from torch import Tensor, nn
from torchvision.transforms import v2

from kd_multiresolution.training.feature_stores import GIB, FileStore, MemoryStore, Store

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16}

# Transforms that give the same image every time. What is not listed may be random.
CONSTANT_TRANSFORMS = (
    v2.CenterCrop,
    v2.ConvertImageDtype,
    v2.Grayscale,
    v2.Identity,
    v2.Normalize,
    v2.Pad,
    v2.RGB,
    v2.Resize,
    v2.ToDtype,
    v2.ToImage,
    ExportableCenterCrop,
    SquarePad,
)


def changing_part(transform: nn.Module | None) -> nn.Module | None:
    """Return the first part of a transform that is not known to give the same image every time, or ``None``."""
    if transform is None or isinstance(transform, CONSTANT_TRANSFORMS):
        return None
    if isinstance(transform, v2.Compose | nn.Sequential):
        parts = transform.transforms if isinstance(transform, v2.Compose) else transform
        return next((part for part in map(changing_part, parts) if part is not None), None)
    return transform


def resizes_to_one_size(transform: nn.Module | None) -> bool:
    """Return whether a transform makes images of one size of all, as far as is known."""
    if isinstance(transform, v2.Compose | nn.Sequential):
        parts = transform.transforms if isinstance(transform, v2.Compose) else transform
        return any(map(resizes_to_one_size, parts))
    return isinstance(transform, v2.Resize) and transform.size is not None and len(transform.size) == 2


class FeatureCache:
    """Keeps the source's features of each image: in memory up to a budget, beyond it in a file, beyond that not at all.

    The file has no name from the start, so that nothing is left behind, however the process ends.

    Args:
        source: maps (N, 3, H, W) images to one (N, C_i, H_i, W_i) tensor per critical point.
        num_images: how many images there are.
        memory: budget in GiB, 0 or more, on the device of the features.
        folder: folder of the file; ``None``: the system's folder for temporary files.
        dtype: ``float32`` or ``float16``, of half the size.
        use: what the images are for, in words.

    Raises:
        ValueError: if ``memory`` is negative, ``folder`` is not a folder, or ``dtype`` is neither of the two.
    """

    Source: TypeAlias = Callable[[Tensor], list[Tensor]]
    Images: TypeAlias = Tensor | Callable[[], Tensor]
    """(N, 3, H, W), or what makes them, for features that are known need no pixels."""

    def __init__(
        self,
        source: Source,
        num_images: int,
        *,
        memory: float = 2.0,
        folder: str | Path | None = None,
        dtype: str = "float32",
        use: str = "training",
    ) -> None:
        check_cache_arguments(dtype, memory, folder)
        self.source = source
        self.num_images = num_images
        self.memory = memory
        self.folder = Path(folder or tempfile.gettempdir())
        self.dtype = DTYPES[dtype]
        self.use = use
        self._rows: dict[str, int] = {}
        self._stores: list[Store] = []
        self._seen: dict[str, Tensor] = {}  # some pixels of each image, until it comes again
        self._compared: list[tuple[Sequence[str], Tensor]] = []  # which images were others then

    def __len__(self) -> int:
        """Return how many images' features are kept."""
        return len(self._rows)

    @property
    def gib_in_memory(self) -> float:
        """How much of the memory is taken, in GiB; all that there will be, from the first image on."""
        return sum(store.nbytes for store in self._stores if isinstance(store, MemoryStore)) / GIB

    @torch.no_grad()
    def features(self, paths: Sequence[str], images: Images) -> list[Tensor]:
        """Return the source's features of a batch, those of known images from the cache.

        Args:
            paths: the images' paths, N.
            images: the images.

        Returns:
            One (N, C_i, H_i, W_i) tensor per critical point, in the memory format channels last.

        Raises:
            RuntimeError: if an image does not have the size of the one that was first seen under its path.
        """
        known = [index for index, path in enumerate(paths) if path in self._rows]
        missing = [index for index, path in enumerate(paths) if path not in self._rows]
        # Each once: a sampler for several processes may repeat an image.
        unchecked = [*{paths[index]: index for index in known if paths[index] in self._seen}.values()]
        pixels = made(images) if missing or unchecked else None
        parts = []
        if known:
            parts.append(self._gather([self._rows[paths[index]] for index in known]))
        if pixels is not None and unchecked:
            self._check([paths[index] for index in unchecked], pixels[unchecked])
        if pixels is not None and missing:
            parts.append(self._computed([paths[index] for index in missing], pixels[missing] if known else pixels))
        levels = parts[0]
        if len(parts) > 1:
            order = torch.tensor([*known, *missing], device=levels[0].device).argsort()
            levels = [torch.cat(level)[order] for level in zip(*parts, strict=True)]
        return [level.permute(0, 3, 1, 2) for level in levels]

    def _computed(self, paths: Sequence[str], images: Tensor) -> list[Tensor]:
        """Return the features of new images as they will be read: in the precision, and the layout, of what is kept."""
        features = self.source(images)
        if not self._stores:
            self._stores = self._reserve(features)
            self._like = features[0].new_empty(0)
        rows = [feature.permute(0, 2, 3, 1).to(self.dtype) for feature in features]
        levels = [level.flatten().view(level.shape) for level in rows]  # in the layout of their order, whatever it was
        capacity = sum(store.capacity for store in self._stores)
        for index, path in enumerate(paths):
            if path in self._rows or len(self._rows) == capacity:
                continue
            store, row = self._place(len(self._rows))
            self._rows[path] = len(self._rows)
            self._stores[store].write(row, [level[index] for level in levels])
            self._seen[path] = some_pixels(images[index]).clone()
        return [level.to(self._like) for level in levels]

    def _gather(self, rows: Sequence[int]) -> list[Tensor]:
        places = [self._place(row) for row in rows]
        parts, order = [], []
        for number, store in enumerate(self._stores):
            wanted = [index for index, (place, _) in enumerate(places) if place == number]
            if wanted:
                parts.append([level.to(self._like) for level in store.read([places[index][1] for index in wanted])])
                order += wanted
        if len(parts) == 1:
            return parts[0]
        positions = torch.tensor(order, device=self._like.device).argsort()
        return [torch.cat(levels).index_select(0, positions) for levels in zip(*parts, strict=True)]

    def _place(self, row: int) -> tuple[int, int]:
        """Return the number of the store, and the row in it."""
        for number, store in enumerate(self._stores):
            if row < store.capacity:
                return number, row
            row -= store.capacity
        raise IndexError(row)

    def _check(self, paths: Sequence[str], images: Tensor) -> None:
        """Compare images with what was first seen under their paths; the answer is waited for elsewhere."""
        # Pixels, not features: mixed precision and another batch around the image move features, never the image.
        new, seen = some_pixels(images), [self._seen.pop(path) for path in paths]
        for path, pixels in zip(paths, seen, strict=True):
            if pixels.shape != new.shape[1:]:
                raise self._changed_error(path)
        old = torch.stack(seen)
        # Numbers that are none compare as equal: they are refused elsewhere, by their own message.
        different = (old - new).abs() > 0.01 * old.abs().amax((1, 2, 3), keepdim=True)
        self._compared.append((paths, different.flatten(1).any(1)))

    def raise_if_changed(self) -> None:
        """Check that images that have come again are those that were first seen under their paths, each once.

        To catch data that changes in ways :func:`changing_part` cannot see. A step does not wait for it.

        Raises:
            RuntimeError: if one is not.
        """
        compared, self._compared = self._compared, []
        for paths, different in compared:
            for path, is_other in zip(paths, different.tolist(), strict=True):
                if is_other:
                    raise self._changed_error(path)

    def _changed_error(self, path: str) -> RuntimeError:
        return RuntimeError(
            f"{path}: this {self.use} image is not the same as when it was first read, so the source's features "
            "cannot be kept. Train with cache=null."
        )

    def _reserve(self, features: Sequence[Tensor]) -> list[Store]:
        """Return the stores in memory and on disk, with room for all images if possible."""
        shapes = [(*feature.shape[-2:], feature.shape[1]) for feature in features]
        size = sum(math.prod(shape) for shape in shapes) * self.dtype.itemsize
        in_memory = min(self.num_images, int(self.memory * GIB / size))
        stores: list[Store] = [MemoryStore(in_memory, shapes, self.dtype, features[0].device)]
        beyond = self.num_images - in_memory
        if beyond:
            needed = f"{self.num_images} {self.use} images: {self.num_images * size / GIB:.1f} GiB of source features"
            try:
                stores.append(FileStore(self.folder, beyond, shapes, self.dtype))
                logger.info("%s, %.1f of them in memory, the rest in %s.", needed, self.memory, self.folder)
            except OSError as error:
                logger.warning(
                    "%s: those of %d images fit into the %.2g GiB of cache_memory that are left for them, the others "
                    "are computed in every epoch, for they do not fit into cache_folder=%s (%s).",
                    needed,
                    in_memory,
                    self.memory,
                    self.folder,
                    error,
                )
        return stores


def some_pixels(images: Tensor) -> Tensor:
    """Return every so many rows and columns of images, 16 to 31 of each where there are as many."""
    height, width = images.shape[-2:]
    return images[..., :: max(height // 16, 1), :: max(width // 16, 1)]


def made(images: FeatureCache.Images) -> Tensor:
    """Return images, made now if they are not."""
    return images if isinstance(images, Tensor) else images()


def check_cache_arguments(dtype: str | None, memory: float, folder: str | Path | None) -> None:
    """Check the arguments of a cache.

    Raises:
        ValueError: if one is out of range.
    """
    if dtype is not None and dtype not in DTYPES:
        msg = f"cache={dtype!r}: expected one of {', '.join(DTYPES)}, or null for none."
        raise ValueError(msg)
    if not 0 <= memory < float("inf"):
        msg = f"cache_memory={memory!r}: expected a number of GiB, 0 or more."
        raise ValueError(msg)
    if folder is not None and not Path(folder).is_dir():
        msg = f"cache_folder={str(folder)!r}: no such folder. Make it first, or leave the argument out."
        raise ValueError(msg)
