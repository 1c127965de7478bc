"""Looking at a model in evaluation while it is trained, and leaving everything as it was found."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn


def mark_of(model: nn.Module) -> float:
    """Return a number that changes whenever the weights of a model do, by a step or by anybody else.

    Statistics of batch norm count as well; an average of weights, put in place at the end of a training, changes it.
    """
    tensors = [
        tensor for tensor in model.state_dict().values() if torch.is_tensor(tensor) and tensor.is_floating_point()
    ]
    return float(torch.nn.utils.get_total_norm(tensors))


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
