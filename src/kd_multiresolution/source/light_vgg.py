"""A small source of our own, ``light_vgg``: VGG's plan at an eighth of its widths, its weights inside the wheel.

It is there for work without a GPU and without a download. It was trained on procedural textures alone (see
``benchmarks/train_light_source.py``), so no photograph and no licence stands behind its weights.
"""

from __future__ import annotations

import copy
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

WIDTHS = ((16, 16), (32, 32), (64, 64), (96, 96), (128, 128))
WEIGHTS = Path(__file__).with_name("weights") / "light_vgg.safetensors"


class LightVGG(nn.Module):
    """Five blocks of two 3x3 convolutions with ReLU, each closed by a 2x2 max pool, as in VGG-13.

    Args:
        batch_norm: put a batch norm after each convolution, to train from scratch; :meth:`fused` takes it out again.

    Attributes:
        features: the layers in a row; the five ``MaxPool2d`` among them are pool1 to pool5, with 16, 32, 64, 96 and
            128 channels.

    Example:
        >>> LightVGG().eval()(torch.rand(2, 3, 64, 64)).shape
        torch.Size([2, 128, 2, 2])
    """

    def __init__(self, *, batch_norm: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for block in WIDTHS:
            for width in block:
                layers.append(nn.Conv2d(channels, width, kernel_size=3, padding=1))
                if batch_norm:
                    layers.append(nn.BatchNorm2d(width))
                layers.append(nn.ReLU())
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """Return pool5's activations.

        Args:
            images: (N, 3, H, W), in [0, 1], not normalised; H and W at least 32.

        Returns:
            (N, 128, H // 32, W // 32), >= 0.
        """
        activations: Tensor = self.features(images)
        return activations

    def fused(self) -> LightVGG:
        """Return a network of plain convolutions that computes what this one computes in ``eval()`` mode.

        Returns:
            A new network in ``eval()`` mode without batch norm; this one is left as it is.
        """
        plain = copy.deepcopy(self).eval()
        layers: list[nn.Module] = []
        for layer in plain.features:
            previous = layers[-1] if layers else None
            if isinstance(layer, nn.BatchNorm2d) and isinstance(previous, nn.Conv2d):
                layers[-1] = fuse_conv_bn_eval(previous, layer)
            else:
                layers.append(layer)
        plain.features = nn.Sequential(*layers)
        return plain


def load_light_vgg(weights: Path | str | None = WEIGHTS) -> LightVGG:
    """Return the light source with its weights, in ``eval()`` mode.

    Args:
        weights: a ``.safetensors`` file written by ``benchmarks/train_light_source.py``, by default the one in the
            wheel. ``None`` leaves the network with PyTorch's random initialisation.

    Raises:
        FileNotFoundError: if the file does not exist.
        RuntimeError: if it holds the weights of another network.

    Example:
        >>> load_light_vgg().training
        False
    """
    network = LightVGG().eval()
    if weights is not None:
        if not Path(weights).is_file():
            msg = f"weights={str(weights)!r}: expected an existing .safetensors file of LightVGG weights."
            raise FileNotFoundError(msg)
        network.load_state_dict(load_file(weights))
    return network
