"""What the trained models cost at inference, in turn, each as a multiple of the backbone's forward pass."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from anomalib.models.components import AnomalibModule
from torch import Tensor, nn

from comparison.candidates import CANDIDATES
from comparison.trial import Trial
from kd_multiresolution.source import Source
from runtimes import Outputs, Run, export, measured, prepared, summary

BACKBONE = "backbone"
LONGEST_REASON = 400  # characters


def measure(
    trials: Mapping[str, Trial],
    checkpoints: Mapping[str, Path],
    runtimes: Sequence[str],
    batches: Sequence[int],
    repetitions: int,
) -> dict[str, Any]:
    """Return a row per runtime and batch size, the size of each exported model in MiB, and what did not run.

    A model is timed as a user runs it, with its pre-processing, on pictures of its own size. One that cannot be
    exported, or whose exported file does not take a batch, keeps nobody else from being timed.

    Args:
        trials: one per model.
        checkpoints: of the same models.
        runtimes: ``torch``, ``openvino``.
        batches: images per run.
        repetitions: of each.
    """
    warnings.filterwarnings("ignore")
    logging.getLogger("anomalib").setLevel(logging.WARNING)
    trial = next(iter(trials.values()))
    torch.set_num_threads(trial.threads)
    size = trial.image_size
    models: dict[str, nn.Module] = {BACKBONE: Source(trial.backbone, critical_points=trial.layers).eval()}
    models |= {name: _load(trials[name], checkpoints[name]) for name in trials}
    rows, sizes, failures = [], {}, {}
    with TemporaryDirectory() as folder:
        for runtime in runtimes:
            runs: dict[str, Run] = {}
            for name, model in models.items():
                file = Path(folder, name, "model.onnx")
                try:
                    if runtime != "torch":
                        file = _export(model, file, size)
                        sizes[name] = sum(part.stat().st_size for part in file.parent.iterdir()) / 2**20
                    runs[name] = prepared(runtime, model, file, trial.threads)
                except Exception as error:
                    if name == BACKBONE:  # without which there is no ratio
                        raise
                    failures[f"{runtime}, {name}"] = _in_a_line(error)
            for batch in batches:
                images = torch.rand(batch, 3, size, size)
                models_alone = {name: run for name, run in runs.items() if name != BACKBONE}
                reasons = {name: reason for name, run in models_alone.items() if (reason := _failure(run, images))}
                failures |= {f"{runtime}, {name}, batch {batch}": reason for name, reason in reasons.items()}
                able = {name: run for name, run in runs.items() if name not in reasons}
                seconds = measured(able, images, repetitions)
                figures = {name: summary(times, seconds[BACKBONE], batch) for name, times in seconds.items()}
                rows.append({"runtime": runtime, "batch": batch, "figures": figures})
    return {"rows": rows, "export_mib": sizes, "failures": failures}


def _failure(run: Run, images: Tensor) -> str | None:
    """Return why a run with these images ends in an error, if it does."""
    try:
        run(images)
    except Exception as error:
        return _in_a_line(error)
    return None


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:LONGEST_REASON]}"


def _load(trial: Trial, checkpoint: Path) -> AnomalibModule:
    kind = type(CANDIDATES[trial.model].build(trial))
    model = kind.load_from_checkpoint(checkpoint, map_location="cpu")
    return model.eval()


def _export(model: nn.Module, file: Path, size: int) -> Path:
    """Write an OpenVINO model by anomalib's own route, the backbone as ONNX; return its file."""
    if isinstance(model, AnomalibModule):
        return model.to_openvino(file.parent, input_size=(size, size))
    file.parent.mkdir(parents=True)
    export(Outputs(model), torch.rand(2, 3, size, size), file)
    return file
