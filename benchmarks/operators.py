"""How many operators reach torch's dispatcher: what a small batch costs on a GPU, where each takes its microseconds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

# They compute nothing, and so do views.
FREE = ("aten::detach", "aten::_unsafe_view", "aten::empty")
WAITING = "aten::_local_scalar_dense"
"""Reads a number of a tensor: the host waits until the device has computed it."""


class OperatorCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operators by name, on any device alike; views and empty tensors are left out."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Count an operator, and run it."""
        del types
        name = func._schema.name
        if not func.is_view and name not in FREE and not name.startswith("profiler::"):
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


def operators(function: Callable[..., object], *arguments: Any) -> Counter[str]:
    """Return how often a call needs each operator; a first call, which may prepare something, is not counted."""
    function(*arguments)
    counter = OperatorCounter()
    with counter:
        function(*arguments)
    return counter.names
