"""One module in several runtimes on the CPU, and how long they take, in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import openvino
import torch
from torch import Tensor, nn

EXPORTED = ("onnxruntime", "openvino")
RUNTIMES = ("torch", "torch.compile", *EXPORTED)
Run = Callable[[Tensor], object]


class Outputs(nn.Module):
    """A model that returns the tensors among its predictions."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return a list of tensors."""
        return [output for output in self.model(images) if output is not None]


def export(module: nn.Module, images: Tensor, file: Path) -> None:
    """Write an ONNX file with a batch of any size.

    Args:
        module: in evaluation mode.
        images: an example of more than one image: a batch of one would be taken for a constant.
        file: the file to write.
    """
    batch = torch.export.Dim("batch", min=1, max=64)
    torch.onnx.export(
        module, (images,), file, dynamo=True, opset_version=18, dynamic_shapes=({0: batch},), verbose=False
    )


def prepared(runtime: str, module: nn.Module, file: Path, threads: int) -> Run:
    """Return a function that runs the module, or the file exported from it, with a number of threads."""
    if runtime == "torch":
        return torch.inference_mode()(module)
    if runtime == "torch.compile":
        return torch.inference_mode()(torch.compile(module))
    if runtime == "onnxruntime":
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda batch: session.run(None, {name: batch.numpy()})
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    compiled = openvino.Core().compile_model(str(file), "CPU", settings)
    return lambda batch: compiled(batch.numpy())


def measured(runs: Mapping[str, Run], images: Tensor, repetitions: int) -> dict[str, list[float]]:
    """Return the seconds of every run in every repetition; a first one is thrown away.

    Every repetition runs all in turn, so that a busy machine slows all of them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repetitions + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run(images)
            seconds[name].append(time.perf_counter() - start)
    return {name: times[1:] for name, times in seconds.items()}


def summary(seconds: Sequence[float], reference: Sequence[float], batch: int) -> dict[str, Any]:
    """Return median and 95th percentile in milliseconds, images per second, and the ratio to a reference.

    Args:
        seconds: of every repetition.
        reference: of the same repetitions.
        batch: images per run.
    """
    median = statistics.median(seconds)
    return {
        "median_ms": 1000 * median,
        "p95_ms": 1000 * float(np.quantile(seconds, 0.95)),
        "images_per_second": batch / median,
        "ratio": statistics.median(ours / theirs for ours, theirs in zip(seconds, reference, strict=True)),
    }
