"""A file is judged by what it holds, in every format, and is afterwards read as if it had not been looked at."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kd_multiresolution.plugin.image_content import check_depth, check_single
from tests.plugin.pictures import DEEP, OTHERS, READ, SEVERAL


@pytest.mark.parametrize("name", DEEP)
def test_more_than_eight_bits_are_refused(name: str, tmp_path: Path) -> None:
    DEEP[name](tmp_path / name)
    with (
        Image.open(tmp_path / name) as image,
        pytest.raises(ValueError, match=r"^(1[026] bits per channel|mode [IF].*): expected eight bits .*; convert it"),
    ):
        check_depth(image)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("signed.tif", "signed values: expected 0 to 255"),
        ("six.tif", "6 channels: expected at most four"),
        ("any.dds", "format DDS: its bits per channel cannot be told; save it as PNG"),
    ],
)
def test_other_values_than_a_picture_has_are_refused(name: str, message: str, tmp_path: Path) -> None:
    OTHERS[name](tmp_path / name)
    with Image.open(tmp_path / name) as image, pytest.raises(ValueError, match=f"^{message}"):
        check_depth(image)


@pytest.mark.parametrize("name", SEVERAL)
def test_several_pictures_are_refused(name: str, tmp_path: Path) -> None:
    SEVERAL[name](tmp_path / name)
    with Image.open(tmp_path / name) as image, pytest.raises(ValueError, match=r"^several pictures.*: expected one"):
        check_single(image)


@pytest.mark.parametrize("name", READ)
def test_all_others_are_read(name: str, tmp_path: Path) -> None:
    READ[name](tmp_path / name)
    with Image.open(tmp_path / name) as image:
        expected = np.asarray(image.convert("RGB"))
    with Image.open(tmp_path / name) as image:
        check_depth(image)
        check_single(image)
        np.testing.assert_array_equal(np.asarray(image.convert("RGB")), expected)
