"""Writers of small images and of files in MNIST's format."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.utils import save_image


def write_image(path: Path, seed: int = 0, mode: str = "L", size: tuple[int, int] = (24, 20)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert("RGBA" if mode == "LA" else mode).convert(mode).save(path)
    return path


def write_noise_folders(root: Path, count: int, size: tuple[int, int] = (48, 40)) -> None:
    """Write as many noisy pictures each into ``good`` and ``bad``."""
    for start, folder in ((0, "good"), (count, "bad")):
        for number in range(count):
            write_image(root / folder / f"{number}.png", start + number, "RGB", size)


def write_squares(root: Path, counts: dict[str, int], size: int = 32, contrast: float = 0.3) -> Path:
    """Write dark noise into each folder, as many pictures as it counts; those of ``defect`` have a brighter square."""
    generator = torch.Generator().manual_seed(0)
    for folder, count in counts.items():
        (root / folder).mkdir()
        for number in range(count):
            picture = 0.3 * torch.rand(3, size, size, generator=generator)
            if folder == "defect":
                picture[:, size // 4 : size * 5 // 8, size // 4 : size * 5 // 8] += contrast
            save_image(picture, root / folder / f"{number}.png")
    return root


def write_idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))
