"""Results of trials as Markdown and plots."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from comparison.candidates import CANDIDATES
from comparison.inference import BACKBONE
from comparison.trial import Trial

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
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for trial, seeds in repetitions(trials).items():
        found = [results[seed] for seed in seeds if seed in results]
        failed = [failures[seed] for seed in seeds if seed in failures]
        images = "all" if trial.train_limit is None else str(trial.train_limit)
        cells = [trial.category, images, CANDIDATES[trial.model].label]
        if found:
            cells += ["/".join(str(n) for n in sorted({result["epochs"] for result in found}))]
            cells += [_mean_and_deviation([100 * result["metrics"][name] for result in found]) for name in METRICS]
            cells += [f"{statistics.median(result[name] for result in found):.0f}" for name in COSTS]
            cells += [str(len(found)) + (f", failed: {failed[0]}" if failed else "")]
        else:
            cells += [f"failed: {failed[0]}" if failed else "not run", *[""] * (len(head) - len(cells) - 1)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def inference_table(inference: Mapping[str, Any]) -> str:
    """Return a row per runtime and model: latency at each batch, best throughput, size of the exported model.

    What did not run has an empty cell, and its reason below.
    """
    rows = inference["rows"]
    batches = sorted({row["batch"] for row in rows})
    head = ["runtime", "model", *(f"batch {batch}: ms, 95 %, ratio" for batch in batches), "images/s", "export, MiB"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for runtime in dict.fromkeys(row["runtime"] for row in rows):
        by_batch = {row["batch"]: row["figures"] for row in rows if row["runtime"] == runtime}
        for name in dict.fromkeys(name for figures in by_batch.values() for name in figures):
            cells = [runtime, CANDIDATES[name].label if name in CANDIDATES else name]
            ran = {batch: figures[name] for batch, figures in by_batch.items() if name in figures}
            for batch in batches:
                f = ran.get(batch)
                cells.append(f"{f['median_ms']:.0f}, {f['p95_ms']:.0f}, {f['ratio']:.2f}" if f else "")
            best, batch = max((f["images_per_second"], batch) for batch, f in ran.items())
            size = "" if runtime == "torch" else f"{inference['export_mib'][name]:.0f}"
            lines.append("| " + " | ".join([*cells, f"{best:.1f} (batch {batch})", size]) + " |")
    if inference["failures"]:
        lines += ["", *(f"- {run}: {reason}" for run, reason in inference["failures"].items())]
    return "\n".join(lines) + "\n"


def repetitions(trials: Iterable[Trial]) -> dict[Trial, list[Trial]]:
    """Return the trials grouped by all but their seed."""
    groups: dict[Trial, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(trial.repeated, []).append(trial)
    return groups


def scatter(trials: Sequence[Trial], results: Results, inference: Mapping[str, Any], file: Path) -> None:
    """Draw accuracy against latency: mean over categories and seeds, one point a model."""
    row = inference["rows"][0]
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axes, metric in zip(figure.subplots(1, 2), ("image_AUROC", "pixel_AUROC"), strict=True):
        for name in dict.fromkeys(trial.model for trial in trials):
            found = [100 * results[t]["metrics"][metric] for t in trials if t.model == name and t in results]
            if found and name in row["figures"]:
                figures = row["figures"][name]
                axes.scatter(figures["median_ms"], statistics.fmean(found), label=CANDIDATES[name].label)
        backbone = row["figures"][BACKBONE]["median_ms"]
        axes.axvline(backbone, color="grey", linestyle=":", label="backbone alone")
        axes.set_xscale("log")
        axes.set_xlabel(f"ms per batch of {row['batch']}, {row['runtime']}")
        axes.set_ylabel(f"{METRICS[metric]} AUROC x 100")
    axes.legend(fontsize="small")
    FigureCanvasAgg(figure).print_figure(file, dpi=120)


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
            (line,) = axes.plot(
                seconds, [statistics.fmean(v) for v in values], ".-", label=CANDIDATES[trial.model].label
            )
            axes.fill_between(
                seconds, [min(v) for v in values], [max(v) for v in values], color=line.get_color(), alpha=0.2, lw=0
            )
        axes.set_xscale("log")
        axes.set_xlabel("seconds of training")
        axes.set_ylabel(f"{METRICS[metric]} AUROC x 100, {category}")
    axes.legend(fontsize="small")
    FigureCanvasAgg(figure).print_figure(file, dpi=120)


def _mean_and_deviation(values: Sequence[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{deviation}"
