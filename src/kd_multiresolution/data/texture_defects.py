"""Textures with drawn defects: a data set that needs no download.

The textures are the three that scikit-image carries in its wheel (brick, grass and gravel, 512 x 512 grey pixels, CC0).
Three blocks on the picture's diagonal are held out for testing, so that both sides see all of its light; training
patches come from what is left, so that the two never share a pixel. Patches of one side overlap: there are far more of
them than the picture has room for, and their figures vary as those of fewer images would.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import skimage.data
from anomalib.data import AnomalibDataset
from anomalib.data.datasets.image.mvtecad import make_mvtec_ad_dataset
from anomalib.data.utils import Split
from anomalib.utils.path import resolve_dataset_root
from PIL import Image
from torchvision.transforms.v2 import Transform

from kd_multiresolution.data.arguments import CheckedDataModule, check_data_arguments
from kd_multiresolution.data.defect_drawing import KINDS, Grey, draw_defect
from kd_multiresolution.plugin.arguments import check_seed

CATEGORIES = ("brick", "grass", "gravel")
VERSION = 2
"""To be raised with every change of the pictures: a folder of another version is never taken for this one."""

PATCH = 128
TEST_BLOCKS = ((0, 0), (160, 160), (320, 320))
TEST_BLOCK = 192
TEST_STEP = 16
TRAIN_PATCHES = 200
DEFECTS_PER_KIND = 7
QUARTER_TURNS = {"brick": 1, "grass": 4, "gravel": 4}
"""Of training patches. What lies on the ground has no upper side; rows of bricks have, and are mirrored alone."""


def train_corners(shape: tuple[int, int]) -> list[tuple[int, int]]:
    """Return the corners (row, column) of all patches of a picture of this shape (H, W) that touch no test block."""
    return [
        (row, column)
        for row in range(shape[0] - PATCH + 1)
        for column in range(shape[1] - PATCH + 1)
        if not any(-PATCH < row - top < TEST_BLOCK and -PATCH < column - left < TEST_BLOCK for top, left in TEST_BLOCKS)
    ]


def test_corners() -> list[tuple[int, int]]:
    """Return the corners (row, column) of the test patches."""
    steps = range(0, TEST_BLOCK - PATCH + 1, TEST_STEP)
    return [(top + row, left + column) for top, left in TEST_BLOCKS for row in steps for column in steps]


def _cut(texture: Grey, corner: tuple[int, int]) -> Grey:
    row, column = corner
    return texture[row : row + PATCH, column : column + PATCH]


def _turned(patch: Grey, quarter_turns: int, rng: np.random.Generator) -> Grey:
    """Return a patch turned and mirrored at random: few pixels show more then, and no two patches are nearly one."""
    turned = np.rot90(patch, int(rng.integers(quarter_turns)))
    return np.ascontiguousarray(turned[:: rng.choice([-1, 1]), :: rng.choice([-1, 1])])


def pictures(category: str, seed: int) -> Iterator[tuple[str, Grey]]:
    """Yield every file of the data set: its path in MVTec AD's layout, and its pixels (PATCH, PATCH), uint8.

    Args:
        category: one of :data:`CATEGORIES`.
        seed: places of the training patches, which test patches stay normal, and all about the defects.
    """
    rng = np.random.default_rng([VERSION, CATEGORIES.index(category), seed])
    texture: Grey = getattr(skimage.data, category)()
    for index, corner in enumerate(rng.choice(train_corners(texture.shape), TRAIN_PATCHES, replace=False)):
        yield f"train/good/{index:03}.png", _turned(_cut(texture, corner), QUARTER_TURNS[category], rng)

    others = [getattr(skimage.data, other)() for other in CATEGORIES if other != category]
    corners = rng.permutation(test_corners())
    strengths = np.linspace(0, 1, DEFECTS_PER_KIND)
    defects = [(kind, index, strength) for kind in KINDS for index, strength in enumerate(strengths)]
    for (kind, index, strength), corner in zip(defects, corners, strict=False):
        foreign = _cut(others[index % len(others)], corner)
        picture, mask = draw_defect(kind, _cut(texture, corner), float(strength), rng, foreign)
        yield f"test/{kind}/{index:03}.png", picture
        yield f"ground_truth/{kind}/{index:03}_mask.png", mask.astype(np.uint8) * 255
    for index, corner in enumerate(corners[len(defects) :]):
        yield f"test/good/{index:03}.png", _cut(texture, corner)


def check_arguments(category: str, seed: int) -> None:
    """Raise a ``ValueError`` unless there is such a category and the seed is one."""
    if category not in CATEGORIES:
        msg = f"category={category!r}: expected one of {', '.join(CATEGORIES)}."
        raise ValueError(msg)
    check_seed("seed", seed)


def ensure_written(root: Path | str, category: str, seed: int) -> Path:
    """Return the folder that holds the pictures, writing them first if they are not there.

    The folder gets its name last, so one that exists is complete, and several processes may do this at once.

    Args:
        root: folder below which each category, seed and version has a folder of its own.
        category: one of :data:`CATEGORIES`.
        seed: 0 or more.

    Raises:
        ValueError: if category or seed is none of these.
    """
    check_arguments(category, seed)
    folder = Path(root) / f"{category}-seed{seed}-v{VERSION}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name, pixels in pictures(category, seed):
            path = unfinished / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
        unfinished.chmod(0o755)
        try:
            unfinished.rename(folder)
        except OSError:
            # Another process was faster; its pictures are the same.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


class TextureDefectsDataset(AnomalibDataset):
    """One split of the textures with drawn defects.

    Args:
        root: folder below which the pictures lie or are written; ``None`` means anomalib's folder for data sets.
        category: ``"brick"``, ``"grass"`` or ``"gravel"``.
        split: ``"train"`` (normal patches only), ``"test"``, or ``None`` for both.
        seed: places of the training patches, which test patches stay normal, and all about the defects.
        augmentations: applied to picture and mask.

    Raises:
        ValueError: if category, split or seed is none of these.
    """

    def __init__(
        self,
        root: Path | str | None = "./datasets/TextureDefects",
        category: str = "brick",
        split: Split | str | None = None,
        seed: int = 0,
        augmentations: Transform | None = None,
    ) -> None:
        super().__init__(augmentations=augmentations)
        if split not in (None, Split.TRAIN, Split.TEST):
            msg = f"split={split!r}: expected 'train', 'test' or None."
            raise ValueError(msg)
        folder = ensure_written(resolve_dataset_root(root, "TextureDefects"), category, seed)
        self.category = category
        self.split = split
        self.samples = make_mvtec_ad_dataset(folder, split=split)


class TextureDefects(CheckedDataModule):
    """Textures with drawn defects and exact masks; needs no download.

    Normal training patches and held-out test patches are cut from one of the pictures that scikit-image carries. Six
    kinds of defects, each in seven strengths, are drawn onto test patches; the other test patches stay normal. The
    patches are written once as PNG files in MVTec AD's layout. Threshold and normalisation come by default from the
    test pictures, which leaves both AUROC figures as they are but flatters F1.

    Args:
        root: folder below which the pictures lie or are written; ``None`` means anomalib's folder for data sets.
        category: ``"brick"``, ``"grass"`` or ``"gravel"``.
        train_batch_size: pictures per training step.
        num_workers: processes that load pictures; they are few and small, so that 0 is fastest.
        val_split_ratio: share of the pictures to validate on, for the modes that split.
        seed: places of the training patches, which test patches stay normal, all about the defects, and anomalib's
            random splits.
        **kwargs: the other arguments of :class:`CheckedDataModule`.

    Raises:
        TypeError: if an argument has another type.
        ValueError: if an argument is out of range.

    Example:
        >>> data = TextureDefects(category="gravel")  # doctest: +SKIP
        >>> data.setup()  # doctest: +SKIP
        >>> next(iter(data.test_dataloader())).gt_mask.shape  # doctest: +SKIP
        torch.Size([32, 128, 128])
    """

    refused_split_modes: ClassVar[dict[str, str]] = {"from_dir": "has no validation folder"}

    def __init__(
        self,
        root: Path | str | None = "./datasets/TextureDefects",
        category: str = "brick",
        *,
        train_batch_size: int = 64,
        num_workers: int = 0,
        val_split_ratio: float = 0.5,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        check_data_arguments(TextureDefects.__init__, locals())
        check_arguments(category, seed)
        super().__init__(
            train_batch_size=train_batch_size,
            num_workers=num_workers,
            val_split_ratio=val_split_ratio,
            seed=seed,
            **kwargs,
        )
        self.root = resolve_dataset_root(root, "TextureDefects")
        self.category = category
        self.pictures_seed = seed

    def prepare_data(self) -> None:
        """Write the pictures unless they are there."""
        ensure_written(self.root, self.category, self.pictures_seed)

    def _setup(self, _stage: str | None = None) -> None:
        self.train_data, self.test_data = (
            TextureDefectsDataset(self.root, self.category, split, self.pictures_seed)
            for split in (Split.TRAIN, Split.TEST)
        )
