"""Images in memory: the loader's own batches, in its order."""

from __future__ import annotations

import pytest
import torch
from anomalib.data import Folder
from torch.utils.data import DataLoader, SubsetRandomSampler

from kd_multiresolution.training.image_memory import RememberedImages, remembering_loader

CPU = torch.device("cpu")


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_remembered_batches_are_the_loaders_own(data: Folder, shuffle: bool, workers: int) -> None:
    data.setup()
    dataset = data.train_data
    original = DataLoader(dataset, batch_size=4, shuffle=shuffle, num_workers=workers, collate_fn=dataset.collate_fn)
    remembering = remembering_loader(original, device=CPU, memory=1.0, progress=False)
    assert isinstance(remembering.dataset, RememberedImages)
    for seed in range(2):
        torch.manual_seed(seed)
        expected = list(original)
        torch.manual_seed(seed)
        for batch, other in zip(remembering, expected, strict=True):
            assert batch.image_path == other.image_path
            assert torch.equal(batch.image, other.image)
            assert torch.equal(batch.gt_label, other.gt_label)


def test_batches_are_made_where_the_training_runs(data: Folder) -> None:
    data.setup()
    dataset = data.train_data
    original = DataLoader(dataset, batch_size=4, collate_fn=dataset.collate_fn, pin_memory=True)
    elsewhere = torch.device("meta")  # tensors without numbers: any device will do
    for batch, other in zip(
        remembering_loader(original, device=elsewhere, memory=1.0, progress=False), original, strict=True
    ):
        assert batch.image_path == other.image_path
        assert (batch.image.device, batch.gt_label.device) == (elsewhere, elsewhere)
        assert batch.image.shape == other.image.shape


def test_a_loader_with_an_order_of_its_own_is_left_alone(data: Folder) -> None:
    data.setup()
    dataset = data.train_data
    loader = DataLoader(dataset, sampler=SubsetRandomSampler([0, 2]), collate_fn=dataset.collate_fn)
    assert remembering_loader(loader, device=CPU, memory=1.0, progress=False) is loader
