"""Where features are kept: rows of one tensor per critical point, in memory or in a file."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

GIB = 2**30


class Store(Protocol):
    """Rows of features.

    Attributes:
        capacity: how many rows there are.
    """

    capacity: int

    def write(self, row: int, levels: Sequence[Tensor]) -> None:
        """Keep the features of an image, one (H_i, W_i, C_i) tensor per critical point."""
        ...

    def read(self, rows: Sequence[int]) -> list[Tensor]:
        """Return the features of N images, one (N, H_i, W_i, C_i) tensor per critical point."""
        ...


class MemoryStore:
    """Rows of features in memory.

    Args:
        capacity: how many rows.
        shapes: (H_i, W_i, C_i) of every critical point.
        dtype: of what is kept.
        device: where it is kept.
    """

    def __init__(
        self, capacity: int, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.capacity = capacity
        self._levels = [torch.empty(capacity, *shape, dtype=dtype, device=device) for shape in shapes]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return sum(level.nbytes for level in self._levels)

    def write(self, row: int, levels: Sequence[Tensor]) -> None:
        """Keep the features of an image."""
        for kept, level in zip(self._levels, levels, strict=True):
            kept[row] = level

    def read(self, rows: Sequence[int]) -> list[Tensor]:
        """Return the features of some images."""
        index = torch.tensor(rows).to(self._levels[0].device, non_blocking=True)  # or else a step waits for a GPU
        return [level.index_select(0, index) for level in self._levels]


class FileStore:
    """Rows of features in a file without a name, which vanishes with it; an image's features lie side by side.

    The file is read and written, not mapped into memory, where its pages would count as the process's own.

    Args:
        folder: on whose disk.
        capacity: how many rows.
        shapes: (H_i, W_i, C_i) of every critical point.
        dtype: of what is kept.

    Raises:
        OSError: if the folder cannot be written to, or has no room.
    """

    def __init__(self, folder: Path, capacity: int, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> None:
        self.capacity = capacity
        self._shapes = shapes
        self._dtype = dtype
        self._counts = [math.prod(shape) for shape in shapes]
        self._row_bytes = sum(self._counts) * dtype.itemsize
        size = capacity * self._row_bytes
        free = shutil.disk_usage(folder).free
        if free < size:
            msg = f"{size / GIB:.1f} GiB needed, {free / GIB:.1f} free"
            raise OSError(msg)
        self._file = tempfile.TemporaryFile(prefix="kd_multiresolution_", dir=folder)  # noqa: SIM115 - kept open
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self._file.fileno(), 0, size)  # or else the disk may fill up in the middle of training

    def write(self, row: int, levels: Sequence[Tensor]) -> None:
        """Keep the features of an image."""
        flat = torch.cat([level.reshape(-1).to("cpu", self._dtype) for level in levels])
        self._file.seek(row * self._row_bytes)
        self._file.write(flat.numpy().data)

    def read(self, rows: Sequence[int]) -> list[Tensor]:
        """Return the features of some images."""
        flat = torch.empty(len(rows), sum(self._counts), dtype=self._dtype)
        for record, row in zip(flat.numpy(), rows, strict=True):
            self._file.seek(row * self._row_bytes)
            self._file.readinto(record.data)
        parts = torch.split(flat, self._counts, dim=1)
        return [part.flatten().view(len(rows), *shape) for part, shape in zip(parts, self._shapes, strict=True)]
