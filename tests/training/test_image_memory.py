"""Images in memory: the loader's own batches, in its order."""

from __future__ import annotations

import pytest
import torch
from anomalib.data import Folder
from torch.utils.data import DataLoader, SubsetRandomSampler

from kd_multiresolution.training.image_memory import RememberedImages, remembering_loader


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_remembered_batches_are_the_loaders_own(data: Folder, shuffle: bool, workers: int) -> None:
    data.setup()
    dataset = data.train_data
    original = DataLoader(dataset, batch_size=4, shuffle=shuffle, num_workers=workers, collate_fn=dataset.collate_fn)
    remembering = remembering_loader(original, memory=1.0, progress=False)
    assert isinstance(remembering.dataset, RememberedImages)
    for seed in range(2):
        torch.manual_seed(seed)
        expected = list(original)
        torch.manual_seed(seed)
        for batch, other in zip(remembering, expected, strict=True):
            assert batch.image_path == other.image_path
            assert torch.equal(batch.image, other.image)
            assert torch.equal(batch.gt_label, other.gt_label)


def test_a_loader_with_an_order_of_its_own_is_left_alone(data: Folder) -> None:
    data.setup()
    dataset = data.train_data
    loader = DataLoader(dataset, sampler=SubsetRandomSampler([0, 2]), collate_fn=dataset.collate_fn)
    assert remembering_loader(loader, memory=1.0, progress=False) is loader
