"""One rule per operator: from the gradient at its output to the gradient at its input, by forward operators alone."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d
from timm.layers.padding import get_same_padding
from torch import Tensor, nn

IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout2d)
# By their exact types: a subclass may compute something else.
KINDS = frozenset(
    {nn.Conv2d, Conv2dSame, nn.BatchNorm2d, BatchNormAct2d, nn.ReLU, nn.ReLU6, nn.MaxPool2d, nn.AvgPool2d, *IDENTITIES}
)


def has_rule(module: nn.Module) -> bool:
    """Whether :func:`pulled_back` has a rule for this module as it is configured."""
    if type(module) not in KINDS:
        return False
    if isinstance(module, nn.Conv2d):
        kernel, stride, padding = module.kernel_size, module.stride, module.padding
        if isinstance(padding, str) or module.padding_mode != "zeros" or module.dilation != (1, 1):
            return False
        if isinstance(module, Conv2dSame) and not all(side % 2 for side in kernel):
            return False
        return stride[0] == stride[1] and all(p < k for p, k in zip(padding, kernel, strict=True))
    if isinstance(module, nn.MaxPool2d):
        square = all(isinstance(number, int) for number in (module.kernel_size, module.stride, module.padding))
        return square and module.dilation == 1 and not module.ceil_mode and not module.return_indices
    if isinstance(module, nn.AvgPool2d):
        # Levels divide image sizes, so what ceil_mode rounds (timm's average pools have it) is always whole.
        disjoint = isinstance(module.kernel_size, int) and module.kernel_size == module.stride and module.padding == 0
        return disjoint and module.divisor_override is None
    if isinstance(module, BatchNormAct2d) and not (isinstance(module.drop, nn.Identity) and has_rule(module.act)):
        return False
    if isinstance(module, nn.BatchNorm2d):
        return module.running_var is not None and module.affine
    return True


def normalized(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Return what a batch norm in evaluation mode computes, without the activation that timm may join to it."""
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)


def _scale(norm: nn.BatchNorm2d) -> Tensor:
    return norm.weight / torch.sqrt(cast("Tensor", norm.running_var) + norm.eps)


def pulled_back(
    module: nn.Module, norm: nn.BatchNorm2d | None, x: Tensor, y: Tensor, gradient: Tensor, *, guided: bool
) -> Tensor:
    """Return the gradient at the input of an operator.

    Args:
        module: the operator, one that :func:`has_rule`.
        norm: the batch norm right behind a convolution, computed as part of it.
        x: its input.
        y: its output.
        gradient: at its output.
        guided: let no negative gradient pass a ReLU.
    """
    if isinstance(module, nn.Conv2d):
        weight = module.weight if norm is None else module.weight * _scale(norm)[:, None, None, None]
        return _convolution_back(module, weight, x, gradient)
    if isinstance(module, nn.BatchNorm2d):
        return gradient * _scale(module)[:, None, None]
    if isinstance(module, nn.ReLU):
        # A product: ONNX Runtime's Where takes several times as long.
        return (y > 0).to(y.dtype) * (torch.relu(gradient) if guided else gradient)
    if isinstance(module, nn.ReLU6):
        return ((y > 0) & (y < 6)).to(y.dtype) * gradient
    if isinstance(module, nn.MaxPool2d):
        return _max_pool_back(module, x, y, gradient)
    if isinstance(module, nn.AvgPool2d):
        size = cast("int", module.kernel_size)
        return _cut(F.interpolate(gradient / size**2, scale_factor=size, mode="nearest"), x, 0, 0)
    return gradient


def _convolution_back(module: nn.Conv2d, weight: Tensor, x: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient at the input of a convolution with this weight, as another convolution.

    Not as a transposed one: OpenVINO's CPU plugin computes garbage where one constant feeds both kinds. With a stride
    s, input pixels of different remainders modulo s see different taps of the kernel: s * s smaller kernels, whose
    results are interleaved.
    """
    stride, groups = module.stride[0], module.groups
    outputs, inputs, *kernel = weight.shape
    taps = [math.ceil(k / stride) for k in kernel]
    rows, columns = (stride * t - k for t, k in zip(taps, kernel, strict=True))
    weight = F.pad(weight, (0, columns, 0, rows))
    weight = weight.reshape(groups, outputs // groups, inputs, taps[0], stride, taps[1], stride)
    weight = weight.permute(0, 2, 4, 6, 1, 3, 5).flip(5, 6)
    weight = weight.reshape(groups * inputs * stride**2, outputs // groups, *taps)
    top, left = _padding(module, x)
    if stride == 1:
        return F.conv2d(gradient, weight, padding=(kernel[0] - 1 - top, kernel[1] - 1 - left), groups=groups)
    phases = F.conv2d(gradient, weight, padding=(taps[0] - 1, taps[1] - 1), groups=groups)
    return _cut(F.pixel_shuffle(phases, stride), x, top, left)


def _padding(module: nn.Conv2d, x: Tensor) -> tuple[int, int]:
    """Return the rows and columns of zeros before the input; TensorFlow's padding puts the odd one behind it."""
    if isinstance(module, Conv2dSame):
        sides = zip(x.shape[-2:], module.kernel_size, module.stride, module.dilation, strict=True)
        top, left = (get_same_padding(*side) // 2 for side in sides)
        return top, left
    top, left = (int(p) for p in module.padding)
    return top, left


def _max_pool_back(module: nn.MaxPool2d, x: Tensor, y: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient at the input of a max pool: each window's goes to its first maximum in reading order."""
    size, stride, padding = (cast("int", number) for number in (module.kernel_size, module.stride, module.padding))
    height, width = y.shape[-2:]
    x_padded = F.pad(x, (padding, padding, padding, padding), value=-math.inf) if padding else x
    reach = (size - 1) // stride
    open_windows = torch.ones_like(y, dtype=torch.bool)
    phases: dict[tuple[int, int], Tensor] = {}
    for row in range(size):
        for column in range(size):
            seen = x_padded[
                :,
                :,
                row : row + stride * (height - 1) + 1 : stride,
                column : column + stride * (width - 1) + 1 : stride,
            ]
            first = (seen == y) & open_windows
            open_windows = open_windows & ~first
            down, right = row // stride, column // stride
            part = first.to(y.dtype) * gradient
            if reach:
                part = F.pad(part, (right, reach - right, down, reach - down))
            phase = (row % stride, column % stride)
            phases[phase] = phases[phase] + part if phase in phases else part
    zeros = torch.zeros_like(next(iter(phases.values())))
    every = [phases.get((row, column), zeros) for row in range(stride) for column in range(stride)]
    interleaved = F.pixel_shuffle(torch.stack(every, 2).flatten(1, 2), stride)
    return _cut(interleaved, x, padding, padding)


def _cut(padded: Tensor, x: Tensor, top: int, left: int) -> Tensor:
    """Cut x's height and width out of a gradient with padding; pixels that no window reached are zero."""
    bottom = x.shape[-2] + top - padded.shape[-2]
    right = x.shape[-1] + left - padded.shape[-1]
    return F.pad(padded, (-left, right, -top, bottom)) if top or left or bottom or right else padded
