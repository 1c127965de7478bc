"""Results of trials as Markdown and plots."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from comparison.candidates import CANDIDATES
from comparison.trial import Trial
from reporting import markdown

Results = Mapping[Trial, Mapping[str, Any]]  # those of trials that are done
METRICS = {"image_AUROC": "image", "pixel_AUROC": "pixel", "AUPRO": "AUPRO"}
COSTS = {
    "fit_seconds": "fit, s",
    "test_seconds": "test, s",
    "peak_mib": "peak, MiB",
    "checkpoint_mib": "checkpoint, MiB",
}


def trials_table(trials: Sequence[Trial], results: Results, failures: Mapping[Trial, str]) -> str:
    """Return a row per category, number of images and model: mean and spread over seeds."""
    head = ["category", "images", "model", "epochs", *METRICS.values(), *COSTS.values(), "seeds"]
    rows = []
    for trial, seeds in repetitions(trials).items():
        found = [results[seed] for seed in seeds if seed in results]
        failed = [f"failed: {failures[seed]}" for seed in seeds if seed in failures][:1]
        images = "all" if trial.train_limit is None else str(trial.train_limit)
        cells = [trial.category, images, CANDIDATES[trial.model].label]
        if found:
            cells += ["/".join(str(n) for n in sorted({result["epochs"] for result in found}))]
            cells += [_mean_and_deviation([100 * result["metrics"][name] for result in found]) for name in METRICS]
            cells += [f"{statistics.median(result[name] for result in found):.0f}" for name in COSTS]
            cells += [", ".join([str(len(found)), *failed])]
        else:
            cells += [*(failed or ["not run"]), *[""] * (len(head) - len(cells) - 1)]
        rows.append(cells)
    return markdown(head, rows, 3)


def repetitions(trials: Iterable[Trial]) -> dict[Trial, list[Trial]]:
    """Return the trials grouped by all but their seed."""
    groups: dict[Trial, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(trial.repeated, []).append(trial)
    return groups


def curves(trials: Sequence[Trial], results: Results, category: str, file: Path) -> None:
    """Draw AUROC over the time of training, mean and range over seeds; a model of one epoch is a point."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, metric in zip(figure.subplots(1, 2), ("image_AUROC", "pixel_AUROC"), strict=True):
        for trial, seeds in repetitions(t for t in trials if t.category == category).items():
            found = [results[seed] for seed in seeds if seed in results]
            ends = [{"seconds": result["fit_seconds"], **result["metrics"]} for result in found]
            # Seeds of a training of no fixed length end at different epochs; the band ends with the first.
            points = [*zip(*(result["curve"] for result in found), strict=False)] or ([tuple(ends)] if ends else [])
            seconds = [statistics.fmean(p["seconds"] for p in point) for point in points]
            values = [[100 * p[metric] for p in point] for point in points]
            means, low, high = ([function(v) for v in values] for function in (statistics.fmean, min, max))
            (line,) = axes.plot(seconds, means, ".-", label=CANDIDATES[trial.model].label)
            axes.fill_between(seconds, low, high, color=line.get_color(), alpha=0.2, lw=0)
        axes.set_xscale("log")
        axes.set_xlabel("seconds of training")
        axes.set_ylabel(f"{METRICS[metric]} AUROC x 100, {category}")
    axes.legend(fontsize="small")
    FigureCanvasAgg(figure).print_figure(file, dpi=120)


def _mean_and_deviation(values: Sequence[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{deviation}"
