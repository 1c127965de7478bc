"""What an image file holds, as its header says: one picture, of at most eight bits per channel."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, cast

from PIL import Image, ImageSequence
from PIL.TiffImagePlugin import BITSPERSAMPLE, SAMPLEFORMAT, SAMPLESPERPIXEL

NEW_SUBFILE_TYPE = 254  # of a TIFF's page; its last bit: a smaller version of another page
START_OF_CODESTREAM = b"\xff\x4f\xff\x51"  # of JPEG 2000


def check_depth(image: Image.Image) -> None:
    """Check that an opened file has at most eight bits per channel.

    The conversion to RGB, ours and anomalib's, would cut deeper values to eight bits without a word: from above in some
    formats, from below in others. Pillow's mode does not say it: a picture of twelve bits in a 16-bit PNG is ``RGB``.

    Raises:
        ValueError: if it has more, or if that cannot be told.
    """
    deep = f"mode {image.mode}" if image.mode.startswith(("I", "F")) else ""
    if not deep:
        tell = _BITS.get(str(image.format))
        bits = tell(image) if tell else None
        if bits is None:
            msg = f"format {image.format}: its bits per channel cannot be told; save it as PNG, with eight"
            raise ValueError(msg)
        deep = f"{bits} bits per channel" if bits > 8 else ""
    if deep:
        msg = f"{deep}: expected eight bits per channel; convert it with the scale that suits your camera"
        raise ValueError(msg)


def check_single(image: Image.Image) -> None:
    """Check that an opened file holds one picture, of which previews do not count.

    Raises:
        ValueError: if there are further ones, which nobody would look at.
    """
    # Phones put a preview, a depth map or the like behind a JPEG (MPO); what any viewer shows is the first.
    if getattr(image, "is_animated", False) and image.format != "MPO" and not _is_followed_by_previews(image):
        msg = "several pictures (pages, or frames of a film): expected one; save each of them as a file of its own"
        raise ValueError(msg)


def _is_followed_by_previews(image: Image.Image) -> bool:
    """Return whether an image of several pages is a TIFF whose first page is the picture, all others smaller ones."""
    if image.format != "TIFF":
        return False
    previews = (cast("Any", page).tag_v2.get(NEW_SUBFILE_TYPE, 0) & 1 for page in ImageSequence.Iterator(image))
    try:
        picture_first = not next(previews) and all(previews)
    except Exception:  # of a further page that Pillow cannot read
        return False
    image.seek(0)
    return picture_first


def _avif_bits(image: Image.Image) -> int | None:
    # Behind the name of each configuration: version, profile, then flags, of which two tell 10 and 12 bits.
    properties = Path(cast("Any", image).filename).read_bytes().partition(b"mdat")[0]
    flags = [match[1][0] for match in re.finditer(rb"av1C..(.)", properties, re.DOTALL)]
    return max((12 if flag & 0x20 else 10 if flag & 0x40 else 8 for flag in flags), default=None)


def _jpeg2000_bits(image: Image.Image) -> int | None:
    header = Path(cast("Any", image).filename).read_bytes().partition(START_OF_CODESTREAM)[2]
    channels = int.from_bytes(header[36:38], "big")
    return max(((depth & 0x7F) + 1 for depth in islice(header, 38, 38 + 3 * channels, 3)), default=None)


def _png_bits(image: Any) -> int:
    return 16 if ";16" in str(image.tile) else 8


def _ppm_bits(image: Any) -> int:
    # The decoder is told the format's largest value, unless it is 255.
    return max((value.bit_length() for value in image.tile[0][3] if isinstance(value, int)), default=8)


def _tiff_bits(image: Any) -> int:
    if max(image.tag_v2.get(SAMPLEFORMAT, (1,))) > 1:
        msg = "signed values: expected 0 to 255; convert it with the scale that suits your camera"
        raise ValueError(msg)
    if (channels := image.tag_v2.get(SAMPLESPERPIXEL, 1)) > 4:
        msg = f"{channels} channels: expected at most four, of which an alpha channel is dropped"
        raise ValueError(msg)
    bits: tuple[int, ...] = image.tag_v2.get(BITSPERSAMPLE, (1,))
    return max(bits)


# By Pillow's name of a format. Those with a number know no others.
_BITS: dict[str, Callable[[Image.Image], int | None]] = {
    **dict.fromkeys(("BMP", "GIF", "JPEG", "MPO", "PCX", "QOI", "TGA", "WEBP"), lambda _: 8),
    "AVIF": _avif_bits,
    "JPEG2000": _jpeg2000_bits,
    "PNG": _png_bits,
    "PPM": _ppm_bits,
    "TIFF": _tiff_bits,
}
