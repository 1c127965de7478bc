from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image

from kd_multiresolution.data import defect_drawing, texture_defects
from kd_multiresolution.data.defect_drawing import KINDS, VISIBLE, draw_defect
from kd_multiresolution.data.texture_defects import CATEGORIES, PATCH, TextureDefects, TextureDefectsDataset


def covered(corners: list[tuple[int, int]], shape: tuple[int, int]) -> np.ndarray:
    area = np.zeros(shape, bool)
    for row, column in corners:
        area[row : row + PATCH, column : column + PATCH] = True
    return area


@pytest.mark.parametrize("category", CATEGORIES)
def test_training_and_test_patches_share_no_pixel(category: str) -> None:
    shape = getattr(skimage.data, category)().shape
    train = covered(texture_defects.train_corners(shape), shape)
    test = covered(texture_defects.test_corners(), shape)
    assert not (train & test).any()
    assert (train | test).all()


@pytest.mark.parametrize("category", CATEGORIES)
def test_every_picture_comes_from_its_own_side_of_the_texture(category: str) -> None:
    texture = getattr(skimage.data, category)()
    windows = np.lib.stride_tricks.sliding_window_view(texture, (PATCH, PATCH))
    corners = {"train": set(texture_defects.train_corners(texture.shape)), "test": set(texture_defects.test_corners())}
    found: dict[str, list[tuple[int, int]]] = {"train": [], "test": []}
    turned = {"train": set(), "test": set()}
    for name, pixels in texture_defects.pictures(category, 0):
        split, label, _ = name.split("/")
        if label != "good" or int(Path(name).stem) % 5:  # some will do
            continue
        for turn, way in enumerate(np.rot90(flipped, turns) for flipped in (pixels, pixels.T) for turns in range(4)):
            candidates = np.argwhere((windows[:, :, 0, ::9] == way[0, ::9]).all(-1))
            places = [(row, column) for row, column in candidates if (windows[row, column] == way).all()]
            found[split] += places
            turned[split] |= {turn} if places else set()
    assert len(found["train"]) == len(set(found["train"])) == texture_defects.TRAIN_PATCHES // 5
    assert corners["train"] >= set(found["train"])
    assert corners["test"] >= set(found["test"]) != set()
    assert len(turned["test"]) == 1
    assert len(turned["train"]) == (4 if category == "brick" else 8)


@pytest.mark.parametrize("category", CATEGORIES)
@pytest.mark.parametrize("kind", KINDS)
def test_mask_is_exactly_where_the_picture_changed_visibly(category: str, kind: str) -> None:
    texture = getattr(skimage.data, category)()
    clean, foreign = texture[200 : 200 + PATCH, 100 : 100 + PATCH], skimage.data.camera()[:PATCH, :PATCH]
    for seed, strength in enumerate((0.0, 0.5, 1.0)):
        before = clean.copy()
        drawn, mask = draw_defect(kind, clean, strength, np.random.default_rng(seed), foreign)
        change = np.abs(drawn.astype(int) - clean)
        assert (clean == before).all()
        assert drawn.dtype == np.uint8
        assert (mask == (change > 0)).all()
        assert change[mask].min() >= VISIBLE
        assert 0.001 < mask.mean() < 0.3


@pytest.mark.parametrize("level", [0, 255])
@pytest.mark.parametrize("kind", KINDS)
def test_mask_is_exact_at_the_ends_of_the_scale(kind: str, level: int) -> None:
    rng = np.random.default_rng(0)
    clean = np.where(rng.random((PATCH, PATCH)) < 0.5, level, 128).astype(np.uint8)
    drawn, mask = draw_defect(kind, clean, 1.0, rng, clean[::-1])
    assert (mask == (drawn != clean)).all()


@pytest.mark.parametrize("kind", ["scratch", "stain", "spots", "dent"])
def test_stronger_defects_differ_more(kind: str) -> None:
    clean = skimage.data.gravel()[:PATCH, :PATCH]
    changes = [
        np.abs(draw_defect(kind, clean, strength, np.random.default_rng(3), clean)[0].astype(float) - clean).max()
        for strength in (0.0, 0.5, 1.0)
    ]
    assert changes == sorted(changes)
    assert changes[0] < changes[-1]


def test_impossible_defects_are_refused() -> None:
    clean = np.zeros((PATCH, PATCH), np.uint8)
    with pytest.raises(ValueError, match=r"kind='rust'.*dent.*stain"):
        draw_defect("rust", clean, 0.5, np.random.default_rng(0), clean)
    with pytest.raises(ValueError, match=r"strength=1.5.*0 to 1"):
        draw_defect("dent", clean, 1.5, np.random.default_rng(0), clean)


def test_pictures_follow_from_category_and_seed_alone() -> None:
    def bytes_of(category: str, seed: int) -> dict[str, bytes]:
        return {name: pixels.tobytes() for name, pixels in texture_defects.pictures(category, seed)}

    first = bytes_of("grass", 1)
    np.random.seed(7)
    assert bytes_of("grass", 1) == first
    assert bytes_of("grass", 2) != first
    assert bytes_of("gravel", 1) != first


def test_half_or_more_of_the_test_patches_are_defective_and_no_place_is_used_twice() -> None:
    pictures = dict(texture_defects.pictures("brick", 0))
    tests = [name for name in pictures if name.startswith("test/")]
    defective = [name for name in tests if "/good/" not in name]
    assert len(defective) == len(KINDS) * texture_defects.DEFECTS_PER_KIND
    assert len(tests) / 2 <= len(defective) < len(tests)
    assert len(tests) == len(texture_defects.test_corners())
    for name in defective:
        assert pictures[name.replace("test/", "ground_truth/").replace(".png", "_mask.png")].any()


def test_files_hold_the_pictures_and_are_written_once(tmp_path: Path) -> None:
    folder = texture_defects.ensure_written(tmp_path, "brick", 0)
    for name, pixels in texture_defects.pictures("brick", 0):
        assert (np.asarray(Image.open(folder / name)) == pixels).all()
    marker = folder / "test" / "good" / "000.png"
    written = marker.stat().st_mtime_ns
    assert texture_defects.ensure_written(tmp_path, "brick", 0) == folder
    assert marker.stat().st_mtime_ns == written


def test_an_interrupted_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    complete = len(list(texture_defects.pictures("brick", 0)))

    def interrupted(*arguments: object) -> object:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(defect_drawing.KINDS, "spots", interrupted)
        with pytest.raises(KeyboardInterrupt):
            texture_defects.ensure_written(tmp_path, "brick", 0)
    assert list(tmp_path.iterdir()) == []
    folder = texture_defects.ensure_written(tmp_path, "brick", 0)
    assert len(list(folder.rglob("*.png"))) == complete


def test_losing_the_race_to_write_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = texture_defects.pictures

    def slow(category: str, seed: int) -> object:
        monkeypatch.setattr(texture_defects, "pictures", original)
        texture_defects.ensure_written(tmp_path, category, seed)
        return original(category, seed)

    monkeypatch.setattr(texture_defects, "pictures", slow)
    folder = texture_defects.ensure_written(tmp_path, "gravel", 0)
    assert list(tmp_path.iterdir()) == [folder]


def test_category_seed_and_version_have_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = {texture_defects.ensure_written(tmp_path, *which) for which in (("brick", 0), ("brick", 1), ("grass", 0))}
    monkeypatch.setattr(texture_defects, "VERSION", 99)
    folders.add(texture_defects.ensure_written(tmp_path, "brick", 0))
    assert len(folders) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"category": "sand"}, r"category='sand'.*brick, grass, gravel"),
        ({"seed": -1}, r"seed=-1: expected a seed, 0 to"),
    ],
)
def test_arguments_are_checked_at_once(arguments: dict, message: str, tmp_path: Path) -> None:
    for make in (TextureDefects, TextureDefectsDataset):
        with pytest.raises(ValueError, match=message):
            make(root=tmp_path / "none", **arguments)
    assert not (tmp_path / "none").exists()


def test_unknown_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"split='val'.*'train', 'test'"):
        TextureDefectsDataset(tmp_path, split="val")


def test_batches_carry_pictures_masks_and_labels(tmp_path: Path) -> None:
    data = TextureDefects(root=tmp_path, category="gravel", train_batch_size=16, eval_batch_size=8, seed=3)
    data.prepare_data()
    data.setup()
    assert data.task == "segmentation"
    assert data.category == "gravel"
    train = next(iter(data.train_dataloader()))
    assert train.image.shape == (16, 3, PATCH, PATCH)
    assert 0 <= train.image.min() < train.image.max() <= 1
    assert not any(item.gt_label for item in data.train_data)
    batches = list(data.test_dataloader())
    masks, labels = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("gt_mask", "gt_label"))
    assert masks.shape[1:] == (PATCH, PATCH)
    assert torch.equal(masks.flatten(1).any(1), labels.bool())
    paths = [path for batch in batches for path in batch.image_path]
    assert len(set(paths)) == len(paths) == len(data.test_data)
    assert [Path(path).is_file() for path in paths] == [True] * len(paths)


def test_validation_set_is_the_test_set_unless_told_otherwise(tmp_path: Path) -> None:
    same = TextureDefects(root=tmp_path)
    same.setup()
    assert list(same.val_data.samples.image_path) == list(same.test_data.samples.image_path)
    split = TextureDefects(root=tmp_path, val_split_mode="from_test", val_split_ratio=0.5)
    split.setup()
    assert not set(split.val_data.samples.image_path) & set(split.test_data.samples.image_path)


def test_without_validation_images_a_model_is_trained(tmp_path: Path) -> None:
    data = TextureDefects(root=tmp_path, val_split_mode="none", num_workers=0)
    data.setup()
    assert data.val_dataloader() == []
    with pytest.raises(ValueError, match="val_split_mode='from_dir': TextureDefects has no validation folder"):
        TextureDefects(root=tmp_path, val_split_mode="from_dir")
