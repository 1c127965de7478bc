"""One local weight file as the backbone's pre-trained weights for all models, through the hub's cache folder.

anomalib's models take the name of a backbone and no file. A cache folder in the hub's layout, in a folder of its own,
serves them all without a network.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import timm
from safetensors.torch import save_file

from kd_multiresolution.source.network import Source

REVISION = "0" * 40  # a commit's name; any will do


def sha256(file: Path) -> str:
    """Return the file's SHA-256."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def fill(cache: Path, backbone: str, layers: Sequence[str], weights: Path) -> None:
    """Write a hub cache that holds the file as timm's weights of the backbone.

    Args:
        cache: folder of the cache.
        backbone: timm's name.
        layers: feature levels that the models use; the file may end after the last.
        weights: ``.safetensors``, or a state dict as ``.pth``.

    Raises:
        ValueError: if the file does not fit the backbone.
    """
    Source(backbone, weights=weights, critical_points=layers)  # the check: a partial file would pass in silence
    published = timm.get_pretrained_cfg(backbone)
    if published is None or not published.hf_hub_id:
        msg = f"backbone={backbone!r}: timm has no pre-trained weights of this name, in whose place to put the file."
        raise ValueError(msg)
    folder = cache / f"models--{published.hf_hub_id.replace('/', '--')}"
    snapshot = folder / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(REVISION)
    tensors = timm.models.load_state_dict(str(weights))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, snapshot / "model.safetensors")


def use(cache: Path) -> None:
    """Have the processes that are started from now on read the cache, and no network."""
    os.environ["HF_HUB_CACHE"] = str(cache)
    os.environ["HF_HUB_OFFLINE"] = "1"
