"""Batch norm folded into convolutions: a network in evaluation mode, in a third fewer operators."""

from __future__ import annotations

import copy
from typing import Any, TypeGuard

import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from kd_multiresolution.source.derived import Derived

# By their exact types: another subclass may compute something else with its weights.
CONVOLUTIONS = (nn.Conv2d, Conv2dSame)
NORMS = (nn.BatchNorm2d, BatchNormAct2d)


class Folding(nn.Module):
    """A network whose batch norms are folded into convolutions, made anew whenever its weights change."""

    def __init__(self) -> None:
        super().__init__()
        self._derived: Derived[nn.Module] = Derived()

    def of(self, network: nn.Module) -> nn.Module:
        """Return the folded form of a network.

        It is the network itself where that is not in evaluation mode, is watched by hooks, is being compiled or
        exported, has nothing to fold, or cannot be recorded.
        """
        if torch.compiler.is_compiling():
            return network  # compilers fold themselves, and exported weights keep their names
        tensors: list[Tensor] = []
        pending: list[nn.Module | None] = [network]
        while pending:
            module = pending.pop()
            if module is None:
                continue
            if module.training or module._forward_hooks or module._forward_pre_hooks:
                return network
            tensors += filter(_is_present, module._parameters.values())
            tensors += filter(_is_present, module._buffers.values())
            pending += module._modules.values()
        return self._derived.get(tensors, lambda: folded(network)) if tensors else network


def _is_norm(layer: object) -> TypeGuard[nn.BatchNorm2d]:
    return type(layer) in NORMS


def _is_convolution(layer: object) -> TypeGuard[nn.Conv2d]:
    return type(layer) in CONVOLUTIONS


def _is_present(tensor: Tensor | None) -> TypeGuard[Tensor]:
    return tensor is not None


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        """Take timm's convolutions and norms for single layers, as torch's are."""
        return type(module) in (*CONVOLUTIONS, *NORMS) or super().is_leaf_module(module, qualified_name)


def folded(network: nn.Module) -> nn.Module:
    """Return a network with its batch norms folded, which shares all other layers; itself if there is nothing to fold.

    Args:
        network: in evaluation mode.
    """
    try:
        graph = _Tracer().trace(network)
    except Exception:  # a network that decides by its values: it stays as it is
        return network
    layers: dict[str, Any] = dict(network.named_modules())
    replaced: dict[str, nn.Module] = {}
    for node in [*graph.nodes]:
        norm = layers.get(node.target) if node.op == "call_module" else None
        if not _is_norm(norm) or norm.training or norm.running_mean is None:
            continue
        before = node.args[0]
        convolution = layers.get(before.target) if before.op == "call_module" else None
        if not _is_convolution(convolution) or len(before.users) > 1 or _calls(graph, before.target) > 1:
            continue
        replaced[before.target] = _fused(convolution, norm)
        if isinstance(norm, BatchNormAct2d):
            replaced[node.target] = nn.Sequential(norm.drop, norm.act)
        else:
            node.replace_all_uses_with(before)
            graph.erase_node(node)
    if not replaced:
        return network
    used = {node.target for node in graph.nodes if node.op == "call_module"}
    attributes = {node.target: _attribute(network, node.target) for node in graph.nodes if node.op == "get_attr"}
    return fx.GraphModule({**{name: layers[name] for name in used}, **replaced, **attributes}, graph)


def _fused(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    dtype = convolution.weight.dtype
    wide = torch.promote_types(dtype, torch.float32)  # as batch norm computes within itself
    fused = fuse_conv_bn_eval(copy.deepcopy(convolution).to(wide), copy.deepcopy(norm).to(wide))
    device = fused.weight.device.type
    # Autocast would cast these weights in every pass.
    return fused.to(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype)


def _calls(graph: fx.Graph, target: str) -> int:
    return sum(node.op == "call_module" and node.target == target for node in graph.nodes)


def _attribute(network: nn.Module, name: str) -> Any:
    found: Any = network
    for part in name.split("."):
        found = getattr(found, part)
    return found
