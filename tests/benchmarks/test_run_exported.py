"""The example that runs an exported model reads a picture as it is, or refuses it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.plugin.pictures import DEEP, READ, SEVERAL

import run_exported

# The example is short: of two pages it does not ask whether one is a preview.
TAKEN = [name for name in READ if Path(name).suffix in {".png", ".jpg", ".bmp", ".tif", ".webp"}]
TAKEN.remove("preview.tif")


@pytest.mark.parametrize("name", [*DEEP, *SEVERAL])
def test_what_would_be_read_wrongly_is_refused(name: str, tmp_path: Path) -> None:
    (DEEP | SEVERAL)[name](tmp_path / name)
    with pytest.raises(ValueError, match=r"^expected one picture of eight bits per channel"):
        run_exported.read(tmp_path / name)


@pytest.mark.parametrize("name", TAKEN)
def test_a_picture_is_read(name: str, tmp_path: Path) -> None:
    READ[name](tmp_path / name)
    with Image.open(tmp_path / name) as image:
        expected = np.asarray(image.convert("RGB"), np.float32) / 255
    np.testing.assert_array_equal(run_exported.read(tmp_path / name)[0], expected.transpose(2, 0, 1))
