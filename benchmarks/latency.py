"""Measure what score and anomaly map cost, as multiples of the source's forward pass alone in the same runtime.

python benchmarks/latency.py --source resnet18 --critical_points layer1 layer2 layer3 --output resnet18

Writes ``resnet18.json`` and ``resnet18.md``. Weights are random: they change no time. Every repetition runs the source
and all variants in turn, so that a busy machine slows all of them; a figure is the median of the repetitions' ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnxruntime
import openvino
import torch
from rich.progress import track
from torch import Tensor, nn

from kd_multiresolution import KdMultiresolutionModel

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "score": {"anomaly_map": None},
    "discrepancy": {"anomaly_map": "discrepancy"},
    "gradient, cloner": {"attribution_path": "cloner"},
    "gradient, both": {"attribution_path": "both"},
}
RUNTIMES = ("torch", "onnxruntime", "openvino")
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
    """Write an ONNX file with a batch of any size."""
    batch = torch.export.Dim("batch", min=1, max=64)
    torch.onnx.export(
        module, (images,), file, dynamo=True, opset_version=18, dynamic_shapes=({0: batch},), verbose=False
    )


def prepared(runtime: str, module: nn.Module, file: Path, threads: int) -> Run:
    """Return a function that runs the module, or the file exported from it, with a number of threads."""
    if runtime == "torch":
        return torch.inference_mode()(module)
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
    """Return the seconds of every run in every repetition; a first one is thrown away."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repetitions + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run(images)
            seconds[name].append(time.perf_counter() - start)
    return {name: times[1:] for name, times in seconds.items()}


def rows(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Return one row per size, runtime and batch size; exported models go to the folder."""
    table = []
    settings = {"pretrained": False, "critical_points": arguments.critical_points}
    models = {
        name: KdMultiresolutionModel(arguments.source, **settings, **changes) for name, changes in VARIANTS.items()
    }
    modules = {name: Outputs(model).eval() for name, model in models.items()}
    modules = {"source": Outputs(models["score"].source).eval(), **modules}
    combinations = [(size, runtime) for size in arguments.sizes for runtime in arguments.runtimes]
    files: dict[tuple[int, str], Path] = {}
    for size, runtime in track(combinations, description="latency"):
        for name, module in modules.items():
            if runtime != "torch" and (size, name) not in files:
                files[size, name] = folder / f"{size}_{len(files)}.onnx"
                # More than one image: a batch of one would be taken for a constant.
                export(module, torch.rand(2, 3, size, size), files[size, name])
        runs = {
            name: prepared(runtime, module, files.get((size, name), folder), arguments.threads)
            for name, module in modules.items()
        }
        for batch in arguments.batches:
            seconds = measured(runs, torch.rand(batch, 3, size, size), arguments.repetitions)
            ratios = {
                name: statistics.median(a / b for a, b in zip(seconds[name], seconds["source"], strict=True))
                for name in VARIANTS
            }
            milliseconds = 1000 * statistics.median(seconds["source"])
            row = {"runtime": runtime, "size": size, "batch": batch, "source_ms": milliseconds, "ratios": ratios}
            table.append(row)
    return table


def markdown(table: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| runtime | size | batch | source, ms | " + " | ".join(VARIANTS) + " |",
        "|---" * (4 + len(VARIANTS)) + "|",
    ]
    for row in table:
        ratios = " | ".join(f"{row['ratios'][name]:.2f}" for name in VARIANTS)
        lines.append(f"| {row['runtime']} | {row['size']} | {row['batch']} | {row['source_ms']:.1f} | {ratios} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", default="vgg16", help="model of timm, or light_vgg")
    parser.add_argument("--critical_points", nargs="+", help="default: the last four levels")
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=RUNTIMES)
    parser.add_argument("--sizes", nargs="+", type=int, default=[128, 256], help="pixels")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="images")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True, help="files to write, without suffix")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        table = rows(arguments, Path(folder))
    settings = {name: getattr(arguments, name) for name in ("source", "critical_points", "threads", "repetitions")}
    arguments.output.with_suffix(".json").write_text(json.dumps({**settings, "rows": table}, indent=1))
    arguments.output.with_suffix(".md").write_text(markdown(table))
    print(markdown(table))
