"""Writers of pictures by what the file holds: those that would be read wrongly, by why, and those that are read."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tifffile
from PIL import Image

Write = Callable[[Path], Any]

EIGHT = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
TWELVE = EIGHT.astype(np.uint16) * 16  # a camera's twelve bits, in a file of sixteen


def opencv(array: np.ndarray, path: Path) -> None:
    assert cv2.imwrite(str(path), array)


def tiff(*pages: np.ndarray, subfiles: tuple[int, ...] = (0, 0), **options: Any) -> Write:
    def write(path: Path) -> None:
        with tifffile.TiffWriter(path, bigtiff=options.pop("bigtiff", False)) as file:
            for page, subfile in zip(pages, subfiles, strict=False):
                file.write(page, subfiletype=subfile, **{"photometric": "rgb", **options})

    return write


def pillow(mode: str = "RGB", *others: np.ndarray, **options: Any) -> Write:
    def write(path: Path) -> None:
        frames = {"save_all": True, "append_images": [*map(Image.fromarray, others)]} if others else {}
        Image.fromarray(EIGHT).convert(mode).save(path, **frames, **options)

    return write


def deep_grey_alpha_png(path: Path) -> None:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in TWELVE[..., :2])
    header = struct.pack(">IIBBBBB", 64, 64, 16, 4, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


def avif_of_ten_bits(path: Path) -> None:
    """Say so in the header alone; the decoder would find eight."""
    pillow()(path)
    content = bytearray(path.read_bytes())
    content[content.index(b"av1C") + 6] |= 0x40
    pixel_information = content.index(b"pixi") + 9
    content[pixel_information : pixel_information + 3] = bytes((10, 10, 10))
    path.write_bytes(content)


FOUR = np.dstack([TWELVE, TWELVE[..., :1]])
SIX = np.dstack([EIGHT, EIGHT])
GREY = TWELVE[..., 0]
PLANES = np.ascontiguousarray(TWELVE.transpose(2, 0, 1))
DEEP: dict[str, Write] = {
    "rgb.png": partial(opencv, TWELVE),
    "rgba.png": partial(opencv, FOUR),
    "grey.png": partial(opencv, GREY),
    "grey_alpha.png": deep_grey_alpha_png,
    "rgb.ppm": partial(opencv, TWELVE),
    "grey.pgm": partial(opencv, GREY),
    "twelve.ppm": lambda path: path.write_bytes(b"P6\n64 64\n4095\n" + TWELVE.astype(">u2").tobytes()),
    "plain.ppm": lambda path: path.write_bytes(b"P3\n2 1\n4095\n4095 0 1 2 3 4\n"),
    "rgb.tif": tiff(TWELVE),
    "planes.tif": tiff(PLANES, planarconfig="separate"),
    "compressed.tif": tiff(TWELVE, compression="deflate"),
    "compressed_planes.tif": tiff(PLANES, planarconfig="separate", compression="lzw"),
    "predicted.tif": tiff(TWELVE, compression="deflate", predictor=True),
    "tiled.tif": tiff(TWELVE, tile=(16, 16)),
    "big.tif": tiff(TWELVE, bigtiff=True),
    "rgba.tif": tiff(FOUR, extrasamples=["unassalpha"]),
    "cmyk.tif": tiff(FOUR, photometric="separated"),
    "grey.tif": tiff(GREY, photometric="minisblack"),
    "inverted.tif": tiff(GREY, photometric="miniswhite"),
    "integer.tif": tiff(GREY.astype(np.int32), photometric="minisblack"),
    "float.tif": tiff(GREY.astype(np.float32), photometric="minisblack"),
    "rgb.jp2": partial(opencv, TWELVE),
    "grey.jp2": partial(opencv, GREY),
    "ten.avif": avif_of_ten_bits,
}
OTHERS: dict[str, Write] = {
    "signed.tif": tiff((EIGHT[..., 0] // 2).astype(np.int8), photometric="minisblack"),
    "six.tif": tiff(SIX, extrasamples=["unspecified"] * 3),
    "any.dds": pillow(),
}
SEVERAL: dict[str, Write] = {
    "pages.tif": tiff(EIGHT, 255 - EIGHT),
    "volume.tif": tiff(*[EIGHT[..., 0]] * 2, photometric="minisblack"),
    "preview_first.tif": tiff(EIGHT[::4, ::4], EIGHT, subfiles=(1, 0)),
    "odd_second_page.tif": tiff(EIGHT, EIGHT.astype(np.float64)),
    "film.gif": pillow("P", 255 - EIGHT),
    "film.webp": pillow("RGB", 255 - EIGHT),
    "film.png": pillow("RGB", 255 - EIGHT),
    "film_with_cover.png": pillow("RGB", 255 - EIGHT, default_image=True),
    "film.avif": pillow("RGB", 255 - EIGHT),
}
READ: dict[str, Write] = {
    "rgb.png": pillow(),
    "palette.png": pillow("P"),
    "grey_alpha.png": pillow("LA"),
    "two_levels.png": pillow("1"),
    "rgb.jpg": pillow(),
    "cmyk.jpg": pillow("CMYK"),
    "phone.jpg": pillow("RGB", EIGHT[::4, ::4], format="MPO"),
    "rgb.bmp": pillow(),
    "fifteen_levels.ppm": lambda path: path.write_bytes(b"P3\n2 1\n15\n15 0 1 2 3 4\n"),
    "rgb.ppm": pillow(),
    "rgb.webp": pillow(),
    "rgb.gif": pillow("P"),
    "rgb.tif": pillow(),
    "jpeg.tif": pillow(compression="jpeg"),
    "two_levels.tif": pillow("1", compression="group4"),
    "cmyk.tif": pillow("CMYK"),
    "rgba.tif": pillow("RGBA"),
    "preview.tif": tiff(EIGHT, EIGHT[::4, ::4], subfiles=(0, 1)),
    "rgb.jp2": pillow(),
    "rgb.j2k": pillow(),
    "rgb.avif": pillow(),
    "rgb.tga": pillow(),
}
