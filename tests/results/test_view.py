"""Which part of a file a model saw. The files' red grows from left to right, their green from top to bottom."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import ImageItem
from anomalib.data.transforms import SquarePad
from anomalib.data.utils import read_image
from PIL import Image
from torchvision.transforms.v2 import (
    CenterCrop,
    Compose,
    Grayscale,
    InterpolationMode,
    Normalize,
    RandomCrop,
    RandomHorizontalFlip,
    RandomRotation,
    Resize,
    Transform,
)
from torchvision.transforms.v2.functional import to_pil_image

from kd_multiresolution.results.view import ModelView

WIDE, TALL = (240, 80), (100, 180)
SIZE = (64, 64)
NORMALIZE = Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def write(path: Path, size: tuple[int, int]) -> str:
    width, height = size
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(20, 235, width)[None]
    pixels[..., 1] = np.linspace(20, 235, height)[:, None]
    Image.fromarray(pixels).save(path)
    return str(path)


def shown(path: str, transform: Transform, size: tuple[int, int] | None = SIZE) -> Image.Image:
    return ModelView([transform]).picture(transform(read_image(path, as_tensor=True)), path, size)


def difference(picture: Image.Image, other: Image.Image) -> float:
    return float(np.abs(np.asarray(picture, float) - np.asarray(other.convert("RGB"), float)).mean())


# What the model saw of the wide file: left, top, right, bottom.
PARTS = {
    "resized": (Resize((32, 32)), (0, 0, 240, 80)),
    "with antialiasing": (Resize((32, 32), antialias=True), (0, 0, 240, 80)),
    "by nearest pixels": (Resize((40, 40), interpolation=InterpolationMode.NEAREST), (0, 0, 240, 80)),
    "enlarged": (Resize((160, 480)), (0, 0, 240, 80)),
    "cropped": (Compose([Resize((128, 128)), CenterCrop((64, 64))]), (60, 20, 180, 60)),
    "by its short side": (Compose([Resize(64), CenterCrop(64)]), (80, 0, 160, 80)),
    "nested": (Compose([Compose([Resize((64, 64))]), CenterCrop((32, 64)), NORMALIZE]), (0, 20, 240, 60)),
    "cropped before": (Compose([CenterCrop((80, 80)), Resize((32, 32))]), (80, 0, 160, 80)),
    "normalised": (Compose([Resize((32, 32)), NORMALIZE]), (0, 0, 240, 80)),
    "untouched": (Grayscale(3), (0, 0, 240, 80)),
}


@pytest.mark.parametrize("name", PARTS)
def test_picture_is_the_part_of_the_file_in_its_proportions(tmp_path: Path, name: str) -> None:
    transform, part = PARTS[name]
    path = write(tmp_path / "wide.png", WIDE)
    picture = shown(path, transform)
    left, top, right, bottom = part
    proportions = (right - left) / (bottom - top)
    assert picture.width / picture.height == pytest.approx(proportions, rel=0.05)
    assert picture.width * picture.height == pytest.approx(SIZE[0] * SIZE[1], rel=0.05)
    with Image.open(path) as file:
        expected = file.crop(part).resize(picture.size)
    assert difference(picture, expected) < 1


def test_picture_is_as_sharp_as_the_file(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "noise.png")
    picture = shown(str(tmp_path / "noise.png"), Resize((16, 16)))
    assert np.array_equal(np.asarray(picture), pixels)


def test_tall_files_stay_tall(tmp_path: Path) -> None:
    picture = shown(write(tmp_path / "tall.png", TALL), Resize((32, 32)))
    assert picture.height / picture.width == pytest.approx(1.8, rel=0.05)


@pytest.mark.parametrize("transform", [SquarePad(), CenterCrop((240, 240))], ids=["repeated", "black"])
def test_padding_is_shown_as_the_model_was_given_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, transform: Transform
) -> None:
    path = write(tmp_path / "wide.png", WIDE)
    transform = Compose([transform, Resize((48, 24))])
    picture = shown(path, transform)
    assert picture.width == picture.height
    given: Image.Image = to_pil_image(transform(read_image(path, as_tensor=True)))
    assert difference(picture, given.resize(picture.size)) < 1
    assert not caplog.text


@pytest.mark.parametrize("transform", [RandomHorizontalFlip(1.0), RandomRotation((20, 20)), RandomCrop((40, 40))])
def test_what_cannot_be_found_in_the_file_is_shown_as_it_was_given(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, transform: Transform
) -> None:
    path = write(tmp_path / "wide.png", WIDE)
    torch.manual_seed(1)
    image = Compose([transform, NORMALIZE])(read_image(path, as_tensor=True))
    torch.manual_seed(2)
    view = ModelView([transform, NORMALIZE])
    picture = view.picture(image, path, SIZE)
    height, width = image.shape[-2:]
    assert picture.width / picture.height == pytest.approx(width / height, rel=0.05)
    plain = image * torch.tensor(NORMALIZE.std)[:, None, None] + torch.tensor(NORMALIZE.mean)[:, None, None]
    expected = Image.fromarray((plain.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()).resize(picture.size)
    assert difference(picture, expected) < 2
    view.picture(image, path, SIZE)
    assert caplog.text.count("Pictures show images as the model was given them") == 1
    assert path in caplog.text


def test_grey_to_the_model_is_still_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "wide.png", WIDE)
    grey = Image.open(path).convert("L").convert("RGB")
    grey.save(path)
    assert shown(path, Compose([Grayscale(3), Resize((32, 32))])).width > 100


def test_another_normalisation_is_undone_as_far_as_can_be_told() -> None:
    image = torch.linspace(-3, 5, 3 * 16 * 16).reshape(3, 16, 16)
    seen = ModelView().seen(image)
    assert (float(seen.min()), float(seen.max())) == (0, 1)
    assert ModelView().seen(torch.full((3, 4, 4), 0.25)).unique().tolist() == [0.25]
    assert ModelView().seen(torch.full((3, 4, 4), -2.0)).unique().tolist() == [0]


def test_looking_at_a_file_draws_no_random_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "wide.png", WIDE)
    view = ModelView([RandomCrop((40, 40))])
    image = RandomCrop((40, 40))(read_image(path, as_tensor=True))
    before = torch.get_rng_state()
    view.picture(image, path, SIZE)
    assert torch.equal(torch.get_rng_state(), before)


def test_names_without_a_file_have_the_image_alone() -> None:
    item = ImageItem(image=torch.rand(3, 20, 40), image_path=None)
    assert ModelView().picture(item.image, "OneClassMNIST/three/7.png", SIZE).size == (91, 45)


@pytest.mark.parametrize("name", ["resized", "enlarged", "cropped", "nested"])
def test_a_picture_as_large_as_what_the_file_has_of_it(name: str, tmp_path: Path) -> None:
    transform, (left, top, right, bottom) = PARTS[name]
    path = write(tmp_path / "wide.png", WIDE)
    picture = shown(path, transform, None)
    assert picture.size == (right - left, bottom - top)
    with Image.open(path) as file:
        assert difference(picture, file.crop((left, top, right, bottom))) < 1


def test_a_picture_without_a_file_is_as_large_as_the_model_has_it() -> None:
    assert ModelView([]).picture(torch.rand(3, 20, 30), None, None).size == (30, 20)
