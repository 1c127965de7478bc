"""Results beside the published figures, as Markdown and as a plot."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from kd_multiresolution.published import Row
from reproduction.results import Results, covers
from reproduction.settings import Settings
from reproduction.tables import Reproduction, Variant

HEADINGS = {
    "image_AUROC": "AUROC of all test images",
    "pixel_AUROC_anomalous": "AUROC of the pixels of anomalous images, maps scaled and masks fractional as the paper's",
}


@dataclass(frozen=True)
class Cell:
    """What was measured for one class, in percent.

    Attributes:
        mean: over splits of the means over seeds of the means over late epochs.
        over_epochs: mean standard deviation over the late epochs of a training; ``None`` where each has one only.
        over_seeds: standard deviation over seeds, averaged over splits; ``None`` for a single seed.
        over_splits: standard deviation over splits, of the means over seeds; ``None`` for a single split.
        trainings: how many there are.
        evaluations: how many late epochs at least.
        epochs: to the end of training, the longest.
        converged: how many of the trainings converged.
        beside: further metrics by name.
    """

    mean: float
    over_epochs: float | None
    over_seeds: float | None
    over_splits: float | None
    trainings: int
    evaluations: int
    epochs: int
    converged: int
    beside: Mapping[str, float]


def measured(results: Results, variant: Variant, wanted: Settings, metric: str, beside: Sequence[str]) -> Cell | None:
    """Return what the results say about one class, over all seeds and splits; ``None`` without any.

    Splits may have been measured with differently many seeds: the mean is that of the splits' means.
    """
    found = {
        (stored.seed, stored.split): result
        for stored, result in results
        if stored.repeated == wanted.repeated and covers(stored, wanted)
    }
    if not found:
        return None
    name = metric if metric.startswith("image_") else f"{variant.view.name}/{metric}"
    figures = {key: _metric(result, name) for key, result in found.items()}
    means = {key: 100 * float(figure["mean"]) for key, figure in figures.items()}
    deviations = [100 * figure["std"] for figure in figures.values() if figure["std"] is not None]
    seeds, splits = (sorted({key[position] for key in means}, key=str) for position in (0, 1))
    by_split = [[mean for key, mean in means.items() if key[1] == split] for split in splits]
    over_seeds = [statistics.stdev(group) for group in by_split if len(group) > 1]
    return Cell(
        mean=statistics.fmean(map(statistics.fmean, by_split)),
        over_epochs=statistics.fmean(deviations) if deviations else None,
        over_seeds=statistics.fmean(over_seeds) if len(seeds) > 1 and over_seeds else None,
        over_splits=statistics.stdev(map(statistics.fmean, by_split)) if len(splits) > 1 else None,
        trainings=len(means),
        evaluations=min(len(figure["values"]) for figure in figures.values()),
        epochs=max(result["epochs"] for result in found.values()),
        converged=sum(result["converged_after"] is not None for result in found.values()),
        beside={
            other: statistics.fmean(100 * _metric(result, other)["mean"] for result in found.values())
            for other in beside
        },
    )


def _metric(result: Mapping[str, Any], name: str) -> Any:
    metrics = result["metrics"]
    if name.startswith("image_"):  # scores are the same in every view
        name = next(key for key in metrics if key.endswith(f"/{name}"))
    return metrics[name]


def render(table: Reproduction, results: Results, failures: Mapping[str, str]) -> str:
    """Return the table as Markdown: our figures, the published ones, the difference."""
    published = table.published
    lines = [f"# Table {table.number}. {published.caption}", ""]
    lines += [f"{HEADINGS[published.metric]}, in percent, raw and unrounded, beside those of arXiv 2011.11108.", ""]
    for variant, columns in table.cells.items():
        cells = _cells(table, variant, columns, results, table.plan.beside)
        if cells:
            lines += _section(table, variant, columns, cells)
    lines += [f"- {method}: not measured, {reason}." for method, reason in table.missing.items()]
    lines += [f"- {name} failed: {reason}" for name, reason in failures.items()]
    competitors = [row for row in published.rows if row.method not in {v.method for v in table.plan.variants}]
    if competitors:
        lines += ["", "Other methods, as the paper has them: " + ", ".join(map(_summary, competitors)) + "."]
    if published.notes:
        lines += ["", "About the published figures:", "", *(f"- {note}" for note in published.notes)]
    return "\n".join([*lines, "", *_conditions(table, results)]) + "\n"


def _cells(
    table: Reproduction, variant: Variant, columns: Mapping[str, Settings], results: Results, beside: Sequence[str]
) -> dict[str, Cell | None]:
    """Return what was measured of the columns asked for, and of others that were measured before."""
    metric = table.published.metric
    cells = {column: measured(results, variant, settings, metric, beside) for column, settings in columns.items()}
    return {column: cell for column, cell in cells.items() if column in table.columns or cell is not None}


def _section(
    table: Reproduction, variant: Variant, columns: Mapping[str, Settings], cells: Mapping[str, Cell | None]
) -> list[str]:
    row, beside = table.published.row(variant.method), table.plan.beside
    figures = dict(zip(table.published.columns, row.values, strict=True))
    spreads = dict(zip(table.published.columns, row.spread or [None] * len(figures), strict=True))
    head = [
        "",
        "published",
        "ours",
        "± late epochs",
        "± seeds",
        "± splits",
        "difference",
        "epochs",
        "converged",
        *beside,
    ]
    first = next(iter(columns.values()))
    points = ", ".join(first.critical_points)
    parts = (
        f"cloner {first.cloner}; terms {first.terms}" if first.variant == "paper" else "variant dual, not the paper's"
    )
    lines = [f"## {variant.method}", "", f"Critical points {points}; {parts}.", ""]
    lines += [_line(head), _line(["---", *["---:"] * (len(head) - 1)])]
    for column, cell in cells.items():
        theirs = _number(figures[column]) + (f" ± {spreads[column]}" if spreads[column] is not None else "")
        lines.append(_line([column, theirs, *_ours(cell, figures[column], beside)]))
    done = {column: cell for column, cell in cells.items() if cell is not None}
    if len(cells) > 1 and done and not table.plan.per_column:
        lines.append(_line(_mean_line(row, done, figures, len(table.published.columns), len(head))))
    return [*lines, ""]


def _mean_line(
    row: Row, done: Mapping[str, Cell], figures: Mapping[str, float | None], count: int, width: int
) -> list[str]:
    """Return the line of means: the published one where all classes were measured, else that of the same classes."""
    whole = len(done) == count
    known = [value for column in done if (value := figures[column]) is not None]
    theirs = row.mean if whole else statistics.fmean(known)
    ours = statistics.fmean(cell.mean for cell in done.values())
    name = "**mean**" if whole else f"**mean of these {len(done)}**"
    cells = [name, _number(theirs), _number(ours), "", "", "", _difference(ours, theirs)]
    return [*cells, *[""] * (width - len(cells))]


def _ours(cell: Cell | None, theirs: float | None, beside: Sequence[str]) -> list[str]:
    if cell is None:
        return ["–"] * (8 + len(beside) - 1)
    late = f"{_number(cell.over_epochs)} ({cell.evaluations})"
    spreads = [late, _number(cell.over_seeds), _number(cell.over_splits)]
    state = [str(cell.epochs), f"{cell.converged} of {cell.trainings}"]
    others = [_number(cell.beside[name]) for name in beside]
    return [_number(cell.mean), *spreads, _difference(cell.mean, theirs), *state, *others]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _difference(ours: float, theirs: float | None) -> str:
    return "–" if theirs is None else f"{ours - theirs:+.2f}"


def _summary(row: Row) -> str:
    figure = row.mean if row.mean is not None else " / ".join("–" if v is None else str(v) for v in row.values)
    return f"{row.method} {figure}"


def _conditions(table: Reproduction, results: Results) -> list[str]:
    """Return under which conditions the figures stand."""
    columns = next(iter(table.cells.values()))
    first = next(iter(columns.values()))
    size = " x ".join(map(str, first.image_size))
    weights = first.weights or ("published weights" if first.pretrained else "random weights")
    evaluated = (
        f"figures are means over up to {first.evaluations} late epochs, {first.interval} apart, never of a best one, "
        "in brackets how many."
        if first.variant == "paper"
        else "figures are those after the last epoch."
    )
    lines = [
        f"Source {first.source} ({weights}, SHA-256 {first.weights_sha256[:12]}), images of {size} pixels, "
        f"{'with' if first.imagenet_normalization else 'without'} ImageNet's normalisation, batches of "
        f"{first.batch_size}; {evaluated} Each ± is a sample standard deviation over what it is named after."
    ]
    repeated = {settings.repeated for columns in table.cells.values() for settings in columns.values()}
    found = [stored for stored, _ in results if stored.repeated in repeated]
    splits = {stored.split for stored in found if stored.split is not None}
    for name, numbers in (("Seeds", {stored.seed for stored in found}), ("Splits", splits)):
        if numbers:
            lines.append(f"{name}: {', '.join(map(str, sorted(numbers)))}.")
    if first.epochs is not None:
        lines.append(f"Training was limited to {first.epochs} epochs.")
    if first.limit is not None:
        lines.append(f"A short run: {first.limit} training images, {first.limit} test images of either kind.")
    return lines


def plot(table: Reproduction, results: Results, path: Path) -> None:
    """Draw published and measured figures, one panel per row of the table, with the spread over late epochs."""
    rows = {variant: _cells(table, variant, columns, results, ()) for variant, columns in table.cells.items()}
    rows = {variant: cells for variant, cells in rows.items() if cells}
    width = max(4, *map(len, rows.values()))
    figure = Figure(figsize=(1.5 + 0.6 * width, 0.6 + 2.4 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(rows), 1, squeeze=False, sharey=True)[:, 0]
    for panel, (variant, cells) in zip(panels, rows.items(), strict=True):
        row = table.published.row(variant.method)
        figures = dict(zip(table.published.columns, row.values, strict=True))
        names = list(cells)
        theirs = [(i, value) for i, c in enumerate(names) if (value := figures[c]) is not None]
        panel.scatter([i for i, _ in theirs], [value for _, value in theirs], marker="_", s=200, label="published")
        ours = [(i, cell) for i, c in enumerate(names) if (cell := cells[c]) is not None]
        panel.errorbar(
            [i for i, _ in ours],
            [cell.mean for _, cell in ours],
            yerr=[cell.over_epochs or 0.0 for _, cell in ours],
            fmt="o",
            color="C1",
            label="measured",
        )
        panel.set_xticks(range(len(names)), names, rotation=45, ha="right")
        panel.set_ylabel(f"{table.published.metric} x 100")
        panel.set_title(variant.method)
    panels[0].legend()
    figure.savefig(path)
