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
from torch import nn

from comparison.candidates import CANDIDATES
from comparison.trial import Trial
from kd_multiresolution.source import Source
from runtimes import Outputs, export, measured, prepared, summary

BACKBONE = "backbone"


def measure(
    trials: Mapping[str, Trial],
    checkpoints: Mapping[str, Path],
    runtimes: Sequence[str],
    batches: Sequence[int],
    repetitions: int,
) -> dict[str, Any]:
    """Return a row per runtime and batch size, and the size of each exported model in MiB.

    A model is timed as a user runs it, with its pre-processing, on pictures of its own size.

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
    rows, sizes = [], {}
    with TemporaryDirectory() as folder:
        for runtime in runtimes:
            runs = {}
            for name, model in models.items():
                file = Path(folder, name, "model.onnx")
                if runtime != "torch":
                    file = _export(model, file, size)
                    sizes[name] = sum(part.stat().st_size for part in file.parent.iterdir()) / 2**20
                runs[name] = prepared(runtime, model, file, trial.threads)
            for batch in batches:
                seconds = measured(runs, torch.rand(batch, 3, size, size), repetitions)
                figures = {name: summary(times, seconds[BACKBONE], batch) for name, times in seconds.items()}
                rows.append({"runtime": runtime, "batch": batch, "figures": figures})
    return {"rows": rows, "export_mib": sizes}


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
