"""The backward pass to the input as forward operators: no exported graph can carry a gradient, but it can carry these.

A network is recorded once as a list of operators. One rule per operator then leads from the gradient at the critical
points back to the input (Eq. 5 of arXiv 2011.11108), with the values that autograd gives, ties in max pools included.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress

import torch
import torch.nn.functional as F  # noqa: N812
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, fx, nn

from kd_multiresolution.paper.backward_rules import has_rule, normalized, pulled_back
from kd_multiresolution.paper.channel_scale import ChannelScale
from kd_multiresolution.paper.discrepancy import TERMS, checked_features, discrepancy, normalize_terms
from kd_multiresolution.source.network import Source

EPS = 1e-8  # where torch's cosine_similarity guards its norms
ADDITIONS = (operator.add, operator.iadd, torch.add)


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


class _Tracer(fx.Tracer):
    """Takes every module that has a rule as one operator."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return has_rule(m) or super().is_leaf_module(m, module_qualified_name)


class RecordedNetwork:
    """A network in evaluation mode, as a list of operators that can be followed in both directions.

    It shares the network's parameters, and has none of its own. Convolutions (with stride and groups), batch norm,
    ReLU, ReLU6, max and average pools, and sums have rules: enough for timm's VGG and ResNet families, for
    EfficientNet-Lite and for every cloner.

    Args:
        network: maps (N, 3, H, W) images to a list of activations.

    Raises:
        ValueError: if the network cannot be recorded or has an operator without a rule; the message says which.
    """

    def __init__(self, network: nn.Module) -> None:
        try:
            graph = _Tracer().trace(network)
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
            elif node.op == "call_module" and has_rule(modules[node.target]):
                module, only_user = modules[node.target], len(node.all_input_nodes[0].users) == 1
                if isinstance(module, BatchNormAct2d):
                    norm = f"{node.name}_norm"
                    self._append(Operation(norm, inputs, module), only_user)
                    inputs, module, only_user = (norm,), module.act, True
                self._append(Operation(node.name, inputs, module), only_user)
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
            elif isinstance(module, nn.ReLU6):
                result = F.relu6(arguments[0])
            elif isinstance(module, nn.BatchNorm2d):
                result = normalized(module, arguments[0])
            else:
                result = module(arguments[0])
                # Runtimes fold it into the convolution; here the values stay the network's own to the last digit, since
                # that digit can decide which of two equal activations a max pool takes.
                result = normalized(operation.norm, result) if operation.norm is not None else result
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
                x, y = results[name], results[operation.output]
                add(name, pulled_back(operation.module, operation.norm, x, y, arrived, guided=guided))
        return pending[self.input]


def recorded_source(source: Source) -> RecordedNetwork:
    """Return the source as a list of operators.

    Raises:
        ValueError: if one of them has no backward rule.
    """
    try:
        return RecordedNetwork(source)
    except ValueError as error:
        msg = (
            f"source={source.name!r}: {error} Its gradient can be taken by autograd, but not by explicit operators, as "
            "in an exported model. Use attribution_path='cloner' or anomaly_map='discrepancy'."
        )
        raise ValueError(msg) from error


def explicit_gradient(
    images: Tensor,
    source: RecordedNetwork | Source,
    cloner: RecordedNetwork,
    is_scored: Sequence[bool],
    *,
    value_weight: float,
    terms: str | Sequence[str] = TERMS,
    guided: bool = False,
    channel_scale: ChannelScale | None = None,
) -> tuple[Tensor, Tensor]:
    """Return each image's score and its gradient at the input, by forward operators alone.

    Args:
        images: (N, 3, H, W), float.
        source: recorded: the gradient runs through it as well; as it is: through the cloner alone.
        cloner: the cloner.
        is_scored: of each critical point, whether it is part of the score.
        value_weight: as for the discrepancy.
        terms: as for the discrepancy.
        guided: as of :meth:`RecordedNetwork.backward`, at the cloner's ReLUs.
        channel_scale: the units in which the cloner imitates the source's features; ``None``: their own.

    Returns:
        The scores (N,) and the gradients (N, 3, H, W).
    """
    at_critical_points, cloner_results = cloner.forward(images)
    if isinstance(source, RecordedNetwork):
        source_features, source_results = source.forward(images)
    else:
        source_features, source_results = source(images), {}
    if channel_scale is not None:
        source_features = channel_scale(source_features)
    scored = [[*compress(features, is_scored)] for features in (source_features, at_critical_points)]
    scores = discrepancy(*scored, value_weight=value_weight, terms=terms)
    at_source, at_cloner = (
        [next(gradients) if scored_here else None for scored_here in is_scored]
        for gradients in map(iter, discrepancy_gradient(*scored, value_weight=value_weight, terms=terms))
    )
    gradient = cloner.backward(cloner_results, at_cloner, guided=guided)
    if isinstance(source, RecordedNetwork):
        if channel_scale is not None:
            at_source = channel_scale.pulled_back(at_source)
        gradient = gradient + source.backward(source_results, at_source)
    return scores, gradient


def discrepancy_gradient(
    source_features: Sequence[Tensor],
    cloner_features: Sequence[Tensor],
    *,
    value_weight: float,
    terms: str | Sequence[str] = TERMS,
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the discrepancy's gradient at the activations of both networks.

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
