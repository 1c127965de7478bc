"""What follows from weights alone, computed once for each state of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


class Derived(nn.Module, Generic[T]):
    """Keeps what was made from some tensors for as long as they are what they were.

    It asks torch's own counter of changes, which the steps of our optimisers, every loaded state and every operation in
    place move on, and whether they are the same tensors at the same place. Edits through ``tensor.data`` and steps of
    other optimisers with ``fused=True``, which torch does not count, show when the model is next put into training or
    evaluation mode. Copies and files of a model go without it: it is made anew.
    """

    def __init__(self) -> None:
        super().__init__()
        self._forget()

    def _forget(self) -> None:
        # What it was made from, and what was made; in a tuple, so that it is no part of the model, and that a thread
        # finds the two together.
        self._kept: tuple[object, T] | None = None
        self._held: list[Tensor] = []

    def train(self, mode: bool = True) -> Derived[T]:
        """Forget what was made."""
        self._forget()
        return super().train(mode)

    def get(self, tensors: Sequence[Tensor], make: Callable[[], T], key: Hashable = None) -> T:
        """Return what the function makes.

        Args:
            tensors: all that it depends on, one at least.
            make: makes it, without gradients.
            key: what else it depends on.
        """
        if torch.compiler.is_compiling():
            return make()  # a graph that is recorded follows the weights by itself
        device = tensors[0].device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        try:
            versions = [tensor._version for tensor in tensors]
        except RuntimeError:  # tensors made in inference mode, whose changes nobody counts
            return make()
        state = (key, autocast, [*map(id, tensors)], versions, [tensor.data_ptr() for tensor in tensors])
        kept = self._kept
        if kept is None or kept[0] != state:
            with torch.inference_mode(False), torch.no_grad():
                kept = (state, make())
            # Held, with the memory that they have now: no others can come to lie at the same place.
            self._held = [*tensors, *(tensor.detach() for tensor in tensors)]
            self._kept = kept
        return kept[1]

    def __deepcopy__(self, memo: object) -> Derived[T]:
        """Return an empty one."""
        return Derived()

    def __reduce__(self) -> tuple[type[Derived[T]], tuple[()]]:
        """Be stored as an empty one."""
        return Derived, ()
