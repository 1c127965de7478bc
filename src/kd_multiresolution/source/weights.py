"""Where the source's weights come from: a file, or, while a checkpoint is loaded, that checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import timm
from torch import nn

_weights_follow: ContextVar[bool] = ContextVar("weights_follow", default=False)


@contextmanager
def weights_follow() -> Iterator[None]:
    """Let every source that is built meanwhile wait for the weights of a checkpoint, and neither fetch nor read any."""
    token = _weights_follow.set(True)
    try:
        yield
    finally:
        _weights_follow.reset(token)


def are_weights_following() -> bool:
    """Return whether a checkpoint is being loaded, whose weights replace whatever a source starts with."""
    return _weights_follow.get()


def load_file(network: nn.Module, name: str, path: Path) -> None:
    """Load a local weight file into the network; what the file holds beyond the last critical point is left out."""
    if not path.is_file():
        msg = f"source_weights={str(path)!r}: no such file."
        raise ValueError(msg)
    try:
        weights = timm.models.load_state_dict(str(path), weights_only=True)  # timm 1.0.15 would run any pickle
    except Exception as error:
        msg = f"source_weights={str(path)!r}: not a readable .safetensors file or .pth state dict ({error})."
        raise ValueError(msg) from error
    expected = {key: tensor.shape for key, tensor in network.state_dict().items() if "num_batches_tracked" not in key}
    missing = [key for key in expected if key not in weights]
    misfits = [key for key, shape in expected.items() if key in weights and weights[key].shape != shape]
    if missing or misfits:
        msg = (
            f"source_weights={str(path)!r} does not fit source={name!r}: "
            f"{len(missing)} tensors are missing ({', '.join(missing[:3])}), "
            f"{len(misfits)} have another shape ({', '.join(misfits[:3])}). If the file ends before the last "
            "critical point, choose earlier critical_points."
        )
        raise ValueError(msg)
    network.load_state_dict({key: weights[key] for key in network.state_dict() if key in weights}, strict=False)
