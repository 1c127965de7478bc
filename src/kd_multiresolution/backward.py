"""The backward pass to the input as forward operators: no exported graph can carry a gradient, but it can carry these.

A network is recorded once as a list of operators. One rule per operator then leads from the gradient at the critical
points back to the input (Eq. 5 of arXiv 2011.11108), with the values that autograd gives, ties in max pools included.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, fx, nn

from kd_multiresolution.discrepancy import TERMS, checked_features, normalize_terms

EPS = 1e-8  # where torch's cosine_similarity guards its norms
ADDITIONS = (operator.add, operator.iadd, torch.add)
IDENTITIES = (nn.Identity, nn.Dropout, nn.Dropout2d)


@dataclass(frozen=True)
class Operation:
    """One operator of a recorded network.

    Attributes:
        output: name of its result.
        inputs: names of its arguments.
        module: the module that computes it; ``None`` for an addition.
        norm: the batch norm right behind a convolution, computed as part of it.
    """

    output: str
    inputs: tuple[str, ...]
    module: nn.Module | None
    norm: nn.BatchNorm2d | None = None


class RecordedNetwork:
    """A network in evaluation mode, as a list of operators that can be followed in both directions.

    It shares the network's parameters, and has none of its own. Convolutions (with stride and groups), batch norm,
    ReLU, max and average pools, and sums have rules: enough for timm's VGG and ResNet families and for every cloner.

    Args:
        network: maps (N, 3, H, W) images to a list of activations.

    Raises:
        ValueError: if the network cannot be recorded or has an operator without a rule; the message says which.
    """

    def __init__(self, network: nn.Module) -> None:
        try:
            graph = fx.Tracer().trace(network)
        except Exception as error:
            msg = f"{type(network).__name__} cannot be recorded as a list of operators ({error})."
            raise ValueError(msg) from error
        modules = dict(network.named_modules())
        self.operations: list[Operation] = []
        for node in graph.nodes:
            inputs = tuple(argument.name for argument in node.all_input_nodes)
            if node.op == "placeholder":
                self.input = node.name
            elif node.op == "output":
                self.outputs = inputs
            elif node.op == "call_module" and _has_rule(modules[node.target]):
                only_user = len(node.all_input_nodes[0].users) == 1
                self._append(Operation(node.name, inputs, modules[node.target]), only_user)
            elif node.op == "call_function" and node.target in ADDITIONS and len(inputs) == 2:
                self.operations.append(Operation(node.name, inputs, None))
            else:
                msg = f"{_description(node, modules)} has no backward rule."
                raise ValueError(msg)

    def _append(self, operation: Operation, only_user: bool) -> None:
        """Append an operation, in a cheaper form where it is the only user of the one before."""
        before = self.operations[-1] if self.operations else None
        if before is not None and only_user and operation.inputs == (before.output,):
            if isinstance(before.module, nn.Conv2d) and isinstance(operation.module, nn.BatchNorm2d):
                self.operations[-1] = replace(before, output=operation.output, norm=operation.module)
                return
            if isinstance(before.module, nn.ReLU) and isinstance(operation.module, nn.MaxPool2d):
                # A maximum of rectified numbers is the rectified maximum, and of these there are fewer.
                self.operations[-1] = replace(before, module=operation.module)
                operation = replace(operation, module=before.module)
        self.operations.append(operation)

    def forward(
        self, images: Tensor, rectify: Callable[[Tensor], Tensor] = torch.relu
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Return the network's activations, and the results of all operators by name for :meth:`backward`.

        Args:
            images: (N, 3, H, W), float.
            rectify: what every ReLU computes.
        """
        results = {self.input: images}
        for operation in self.operations:
            arguments = [results[name] for name in operation.inputs]
            module = operation.module
            if module is None:
                result = arguments[0] + arguments[1]
            elif isinstance(module, nn.ReLU):
                # Not the module: it may work in place, and backward needs what lies before it.
                result = rectify(arguments[0])
            else:
                result = module(arguments[0])
                # Runtimes fold it into the convolution; here the values stay the network's own to the last digit, since
                # that digit can decide which of two equal activations a max pool takes.
                result = operation.norm(result) if operation.norm is not None else result
            results[operation.output] = result
        return [results[name] for name in self.outputs], results

    def backward(
        self, results: Mapping[str, Tensor], gradients: Sequence[Tensor | None], *, guided: bool = False
    ) -> Tensor:
        """Return the gradient at the input.

        Args:
            results: the second return value of :meth:`forward`.
            gradients: the gradient at each of the network's activations, ``None`` for zero.
            guided: let no negative gradient pass a ReLU (guided backpropagation, Sec. 3.3.4).

        Returns:
            (N, 3, H, W).
        """
        pending: dict[str, Tensor] = {}

        def add(name: str, gradient: Tensor) -> None:
            pending[name] = pending[name] + gradient if name in pending else gradient

        for name, gradient in zip(self.outputs, gradients, strict=True):
            if gradient is not None:
                add(name, gradient)
        for operation in reversed(self.operations):
            arrived = pending.pop(operation.output, None)
            if arrived is None:
                continue
            if operation.module is None:
                for name in operation.inputs:
                    add(name, arrived)
            else:
                (name,) = operation.inputs
                add(name, _pulled_back(operation, results[name], results[operation.output], arrived, guided))
        return pending[self.input]


def discrepancy_gradient(
    source_features: Sequence[Tensor],
    cloner_features: Sequence[Tensor],
    *,
    value_weight: float,
    terms: str | Sequence[str] = TERMS,
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the gradient of :func:`kd_multiresolution.discrepancy.discrepancy` at the activations of both networks.

    Args:
        source_features: one (N, C_i, H_i, W_i) tensor per critical point.
        cloner_features: of the same shapes.
        value_weight: as for the discrepancy.
        terms: as for the discrepancy.

    Returns:
        Two lists of tensors of these shapes and types, for the source and for the cloner.

    Raises:
        ValueError: as for the discrepancy.
    """
    names = normalize_terms(terms)
    at_source, at_cloner = [], []
    for source, cloner in zip(*checked_features(source_features, cloner_features), strict=True):
        for_source, for_cloner = torch.zeros_like(source), torch.zeros_like(cloner)
        if "value" in names:
            weight = value_weight if "direction" in names else 1.0
            difference = (source - cloner) * (2 * weight / math.prod(source.shape[1:]))
            for_source, for_cloner = difference, -difference
        if "direction" in names:
            source_norm, cloner_norm = (
                torch.linalg.vector_norm(features, dim=(1, 2, 3), keepdim=True).clamp_min(EPS)
                for features in (source, cloner)
            )
            source_unit, cloner_unit = source / source_norm, cloner / cloner_norm
            cosine = (source_unit * cloner_unit).sum((1, 2, 3), keepdim=True)
            # Where rounding puts the cosine above one, the discrepancy is clamped and has no slope.
            below = (cosine <= 1).to(cosine.dtype)
            for_source = for_source + (cosine * source_unit - cloner_unit) * (below / source_norm)
            for_cloner = for_cloner + (cosine * cloner_unit - source_unit) * (below / cloner_norm)
        at_source.append(for_source)
        at_cloner.append(for_cloner)
    return (
        [gradient.to(f.dtype) for gradient, f in zip(at_source, source_features, strict=True)],
        [gradient.to(f.dtype) for gradient, f in zip(at_cloner, cloner_features, strict=True)],
    )


def _description(node: fx.Node, modules: Mapping[str, nn.Module]) -> str:
    """Say which layer of the network, or which operator in it, a node is."""
    if node.op == "call_module":
        return f"layer {node.target}, {modules[str(node.target)]},"
    operation = getattr(node.target, "__name__", node.target)
    stack = list(node.meta.get("nn_module_stack", {}).values())
    within = f" in layer {stack[-1][0]}, {stack[-1][1].__name__}," if stack else ""
    return f"operator {operation}{within}"


def _has_rule(module: nn.Module) -> bool:
    """Whether :func:`_pulled_back` has a rule for this module as it is configured."""
    if isinstance(module, nn.Conv2d):
        kernel, stride, padding = module.kernel_size, module.stride, module.padding
        if isinstance(padding, str) or module.padding_mode != "zeros" or module.dilation != (1, 1):
            return False
        return stride[0] == stride[1] and all(p < k for p, k in zip(padding, kernel, strict=True))
    if isinstance(module, nn.MaxPool2d):
        square = all(isinstance(number, int) for number in (module.kernel_size, module.stride, module.padding))
        return square and module.dilation == 1 and not module.ceil_mode and not module.return_indices
    if isinstance(module, nn.AvgPool2d):
        # Levels divide image sizes, so what ceil_mode rounds (timm's average pools have it) is always whole.
        disjoint = isinstance(module.kernel_size, int) and module.kernel_size == module.stride and module.padding == 0
        return disjoint and module.divisor_override is None
    if isinstance(module, nn.BatchNorm2d):
        return module.running_var is not None and module.affine
    return isinstance(module, (nn.ReLU, *IDENTITIES))


def _scale(norm: nn.BatchNorm2d) -> Tensor:
    return norm.weight / torch.sqrt(cast("Tensor", norm.running_var) + norm.eps)


def _pulled_back(operation: Operation, x: Tensor, y: Tensor, gradient: Tensor, guided: bool) -> Tensor:
    """Return the gradient at the input x of an operation with the output y."""
    module = operation.module
    if isinstance(module, nn.Conv2d):
        norm = operation.norm
        weight = module.weight if norm is None else module.weight * _scale(norm)[:, None, None, None]
        return _convolution_back(module, weight, x, gradient)
    if isinstance(module, nn.BatchNorm2d):
        return gradient * _scale(module)[:, None, None]
    if isinstance(module, nn.ReLU):
        # A product: ONNX Runtime's Where takes several times as long.
        return (y > 0).to(y.dtype) * (torch.relu(gradient) if guided else gradient)
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
    top, left = (int(p) for p in module.padding)
    if stride == 1:
        return F.conv2d(gradient, weight, padding=(kernel[0] - 1 - top, kernel[1] - 1 - left), groups=groups)
    phases = F.conv2d(gradient, weight, padding=(taps[0] - 1, taps[1] - 1), groups=groups)
    return _cut(F.pixel_shuffle(phases, stride), x, top, left)


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
