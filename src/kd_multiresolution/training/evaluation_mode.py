"""Looking at a model in evaluation while it is trained, and leaving everything as it was found."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn


def mark_of(model: nn.Module) -> bytes:
    """Return what tells a model's weights from any others; the frozen source's, which never change, are left out.

    Statistics of batch norm count as well, and weights that were put in place by somebody else than a step. All of them
    are on one device.
    """
    tensors = [tensor for name, tensor in sorted(model.state_dict().items()) if not name.startswith("source.")]
    parts = [tensor.detach().contiguous().flatten().view(torch.uint8) for tensor in tensors if torch.is_tensor(tensor)]
    together = torch.cat(parts).cpu()  # in one copy: a host waits for a GPU at each
    return hashlib.blake2b(together.numpy().data, digest_size=16).digest()


@contextmanager
def evaluation_mode(models: Iterable[nn.Module]) -> Iterator[None]:
    """Put models into evaluation mode, without gradients, and with random numbers of their own.

    Afterwards each of their modules is in the mode it was found in, and so are the random generators: loaders draw a
    seed from the global one, even without workers.
    """
    parts = [*models]
    modes = [(module, module.training) for model in parts for module in model.modules()]
    for model in parts:
        model.eval()
    try:
        with isolate_rng(), torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
