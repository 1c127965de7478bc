"""Models in several runtimes, on the CPU or a GPU, and what they cost as multiples of a first one's time."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, TypeVar

import numpy as np
import onnxruntime
import torch
from anomalib.models.components import AnomalibModule
from rich.progress import track
from torch import Tensor, nn

from kd_multiresolution.plugin.export_check import open_vino_core
from reporting import MIB, in_a_line, markdown, now

EXPORTED = ("onnxruntime", "openvino")
RUNTIMES = ("torch", "torch.compile", *EXPORTED)
DEVICES = {"cpu": "cpu", "gpu": "cuda"}
Run = Callable[[Tensor], object]
T = TypeVar("T")


class Outputs(nn.Module):
    """A model that returns the tensors among its predictions."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return a list of tensors."""
        return [output for output in self.model(images) if output is not None]


class Prepared(NamedTuple):
    """A function that runs a model, and how many MiB its exported file has."""

    run: Run
    export_mib: float | None = None


def export(model: nn.Module, folder: Path, size: int, runtime: str) -> Path:
    """Write a model for a batch of any size into a folder of its own: one of anomalib's by anomalib's own route."""
    if isinstance(model, AnomalibModule):
        write = model.to_openvino if runtime == "openvino" else model.to_onnx
        return write(folder, input_size=(size, size))
    folder.mkdir()
    images = torch.rand(2, 3, size, size)  # a batch of one would be taken for a constant
    batch = torch.export.Dim("batch", min=1, max=64)
    torch.onnx.export(
        Outputs(model).eval(), (images,), folder / "model.onnx", dynamo=True, opset_version=18,
        dynamic_shapes=({0: batch},), verbose=False,
    )  # fmt: skip
    return folder / "model.onnx"


def prepared(runtime: str, model: nn.Module, folder: Path, size: int, threads: int) -> Prepared:
    """Return how to run a model in a runtime, exported to a folder if it has to be, with a number of threads."""
    if runtime not in EXPORTED:
        return Prepared(torch.inference_mode()(torch.compile(model) if runtime == "torch.compile" else model))
    file = export(model, folder, size, runtime)
    mib = sum(part.stat().st_size for part in file.parent.iterdir()) / MIB
    if runtime == "onnxruntime":
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return Prepared(lambda batch: session.run(None, {name: batch.numpy()}), mib)
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    compiled = open_vino_core().compile_model(str(file), "CPU", settings)
    return Prepared(lambda batch: compiled(batch.numpy()), mib)


def measure(
    models: Mapping[str, nn.Module],
    runtimes: Sequence[str],
    size: int,
    batches: Sequence[int],
    repetitions: int,
    *,
    threads: int,
    accelerator: str = "cpu",
) -> dict[str, Any]:
    """Return a row per runtime and batch, and what did not run.

    A model that cannot be exported, or whose exported file does not take a batch, keeps no other from being timed.

    Args:
        models: in evaluation mode; the others' times are in multiples of the first one's.
        runtimes: some of :data:`RUNTIMES`; exported models run on the CPU.
        size: height and width of the images in pixels.
        batches: images per run.
        repetitions: of each.
        threads: of the CPU.
        accelerator: ``cpu``, or ``gpu`` for torch.
    """
    torch.set_num_threads(threads)
    rows: list[dict[str, Any]] = []
    failures: dict[str, str] = {}
    reference, *others = models
    for runtime in track(runtimes, description="inference"):
        device = "cpu" if runtime in EXPORTED else DEVICES[accelerator]
        with TemporaryDirectory() as folder:
            # Without the reference there is no ratio: it may fail.
            able = {reference: prepared(runtime, models[reference].to(device), Path(folder, reference), size, threads)}
            for name in others:
                found = _tried(prepared, runtime, models[name].to(device), Path(folder, name), size, threads)
                if isinstance(found, Prepared):
                    able[name] = found
                else:
                    failures[f"{runtime}, {name}"] = in_a_line(found)
            for batch in batches:
                images = torch.rand(batch, 3, size, size).to(device)
                able[reference].run(images)  # the first run of each is not timed
                firsts = {name: _tried(able[name].run, images) for name in able}
                reasons = {name: in_a_line(found) for name, found in firsts.items() if isinstance(found, Exception)}
                failures |= {f"{runtime}, {name}, batch {batch}": reason for name, reason in reasons.items()}
                seconds = _timed({name: able[name].run for name in able if name not in reasons}, images, repetitions)
                figures = {
                    name: {**_summary(times, seconds[reference], batch), "export_mib": able[name].export_mib}
                    for name, times in seconds.items()
                }
                rows.append({"runtime": runtime, "batch": batch, "figures": figures})
    return {"rows": rows, "failures": failures}


def _tried(function: Callable[..., T], *arguments: object) -> T | Exception:
    """Return what a function returns, or the error in which it ends."""
    try:
        return function(*arguments)
    except Exception as error:
        return error


def _timed(runs: Mapping[str, Run], images: Tensor, repetitions: int) -> dict[str, list[float]]:
    """Return the seconds of every run; a repetition takes all in turn, so that a busy machine slows all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repetitions):
        for name, run in runs.items():
            start = now()
            run(images)
            seconds[name].append(now() - start)
    return seconds


def _summary(seconds: Sequence[float], reference: Sequence[float], batch: int) -> dict[str, float]:
    """Return median and 95th percentile in milliseconds, images per second, and the ratio to the reference's turns."""
    median = statistics.median(seconds)
    return {
        "median_ms": 1000 * median,
        "p95_ms": 1000 * float(np.quantile(seconds, 0.95)),
        "images_per_second": batch / median,
        "ratio": statistics.median(ours / theirs for ours, theirs in zip(seconds, reference, strict=True)),
    }


def inference_table(found: Mapping[str, Any], labels: Mapping[str, str] | None = None) -> str:
    """Return a row per runtime and model: latency at each batch, best throughput, size of the exported model.

    What did not run has an empty cell, and its reason below.

    Args:
        found: by :func:`measure`.
        labels: of the models, where their names are others.
    """
    batches = sorted({row["batch"] for row in found["rows"]})
    head = ["runtime", "model", *(f"batch {batch}: ms, 95 %, ratio" for batch in batches)]
    head += ["images/s", "export, MiB"]
    lines = []
    for runtime in dict.fromkeys(row["runtime"] for row in found["rows"]):
        by_batch = {row["batch"]: row["figures"] for row in found["rows"] if row["runtime"] == runtime}
        for name in dict.fromkeys(name for figures in by_batch.values() for name in figures):
            ran = {batch: figures[name] for batch, figures in by_batch.items() if name in figures}
            cells = [
                f"{f['median_ms']:.1f}, {f['p95_ms']:.1f}, {f['ratio']:.2f}" if (f := ran.get(batch)) else ""
                for batch in batches
            ]
            best, batch = max((f["images_per_second"], batch) for batch, f in ran.items())
            mib = ran[batch]["export_mib"]
            end = [f"{best:.1f} (batch {batch})", "" if mib is None else f"{mib:.0f}"]
            lines.append([runtime, (labels or {}).get(name, name), *cells, *end])
    reasons = [f"- {run}: {reason}" for run, reason in found["failures"].items()]
    return markdown(head, lines, 2) + "\n".join(["", *reasons, ""] if reasons else [])
