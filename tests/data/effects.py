"""Whether an argument of a data module changes anything: which images a run reads, how, and what it calls them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from anomalib.data import AnomalibDataModule


def another(value: Any) -> Any:
    """Return another value of an argument's type; of a text, a name or folder that has to be there."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    return value / 2 if isinstance(value, float) else "other"


def changes_anything(module: Callable[..., AnomalibDataModule], given: dict[str, Any], name: str, value: Any) -> bool:
    """Return whether another value of an argument makes another data module."""
    return _described(module(**{**given, name: value})) != _described(module(**given))


def _described(data: AnomalibDataModule) -> list[Any]:
    torch.manual_seed(0)  # of splits without a seed of their own
    data.setup()
    described: list[Any] = [data.name, data.category]
    for name in ("train", "val", "test"):
        dataset = getattr(data, f"{name}_data", None)
        if dataset is not None:
            loader = getattr(data, f"{name}_dataloader")()
            files = dataset.samples[["image_path", "mask_path", "label_index"]].to_numpy().tolist()
            described.append([files, repr(dataset.augmentations), loader.batch_size, loader.num_workers])
    return described
