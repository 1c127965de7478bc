"""What the trained models cost at inference, in turn, each as a multiple of the backbone's forward pass."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

import runtimes
from comparison.candidates import CANDIDATES
from comparison.trial import Trial
from kd_multiresolution.source.network import Source
from reporting import quiet

BACKBONE = "backbone"


def measure(
    trials: Mapping[str, Trial],
    checkpoints: Mapping[str, Path],
    names: Sequence[str],
    batches: Sequence[int],
    repetitions: int,
    accelerator: str = "cpu",
) -> dict[str, Any]:
    """Return what :func:`runtimes.measure` finds.

    A model is timed as a user runs it, with its pre-processing, on pictures of its own size.

    Args:
        trials: one per model.
        checkpoints: of the same models.
        names: of the runtimes.
        batches: images per run.
        repetitions: of each.
        accelerator: ``cpu`` or ``gpu``.
    """
    quiet()
    warnings.filterwarnings("ignore")
    # Whose backbone is its own is held against the others' all the same.
    trial = min(trials.values(), key=lambda trial: CANDIDATES[trial.model].backbone is not None)
    models: dict[str, nn.Module] = {BACKBONE: Source(trial.backbone, critical_points=trial.layers).eval()}
    for name in trials:
        kind = type(CANDIDATES[name].build(trials[name]))
        # Python 3.11.0 to 3.11.3 pickles an enum among PatchCore's arguments as a call, which torch takes from a
        # trusted file alone. These were written by this benchmark.
        models[name] = kind.load_from_checkpoint(checkpoints[name], map_location="cpu", weights_only=False).eval()
    return runtimes.measure(
        models, names, trial.image_size, batches, repetitions, threads=trial.threads, accelerator=accelerator
    )
