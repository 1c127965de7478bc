"""Where the source's weights come from: a file, or, while a checkpoint is loaded, that checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import timm
from torch import Tensor, nn

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


def read_file(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a local weight file by name.

    Raises:
        ValueError: if there is no such file, or it is not one.
    """
    if not path.is_file():
        msg = f"source_weights={str(path)!r}: {'a folder, not a file' if path.is_dir() else 'no such file'}."
        raise ValueError(msg)
    try:
        weights: dict[str, Tensor] = timm.models.load_state_dict(str(path), weights_only=True)  # 1.0.15 ran any pickle
    except Exception as error:
        msg = f"source_weights={str(path)!r}: not a readable .safetensors file or .pth state dict ({error!r})."
        raise ValueError(msg) from error
    return weights


def load(network: nn.Module, weights: Mapping[str, Tensor], said: str) -> None:
    """Load weights into a network; what they hold beyond the last critical point is left out.

    Args:
        network: under whose names the weights are.
        weights: tensors by name.
        said: what does not fit what, for the error.

    Raises:
        ValueError: if tensors are missing, or have another shape.
    """
    expected = {key: tensor.shape for key, tensor in network.state_dict().items() if "num_batches_tracked" not in key}
    missing = [key for key in expected if key not in weights]
    misfits = [key for key, shape in expected.items() if key in weights and weights[key].shape != shape]
    if missing or misfits:
        msg = (
            f"{said}: "
            f"{len(missing)} tensors are missing ({', '.join(missing[:3])}), "
            f"{len(misfits)} have another shape ({', '.join(misfits[:3])})."
        )
        if len(missing) < len(expected):
            msg += " If the file ends before the last critical point, choose earlier critical_points."
        raise ValueError(msg)
    network.load_state_dict({key: weights[key] for key in network.state_dict() if key in weights}, strict=False)
