"""Results beside the published figures, as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kd_multiresolution.results.published import Row
from reporting import markdown
from reproduction.results import Results, covers
from reproduction.settings import Settings
from reproduction.tables import Case, Reproduction

HEADINGS = {
    "image_AUROC": "AUROC of all test images",
    "pixel_AUROC_anomalous": "AUROC of the pixels of anomalous images, maps scaled and masks fractional as the paper's",
}
BESIDE = {
    "image_F1": "image_F1 is the highest that a threshold reaches.",
    "maps/pixel_AUROC": "maps/pixel_AUROC and maps/AUPRO are anomalib's: all images, binary masks, maps as they are.",
}
OURS = ("ours", "± late epochs", "± seeds", "± splits", "difference", "epochs", "converged")


@dataclass(frozen=True)
class Cell:
    """What was measured for one class, in percent; `None`: not to be told of so few trainings."""

    mean: float  # over splits of the means over seeds of the means over late epochs
    over_epochs: float | None  # mean standard deviation over the late epochs of a training
    over_seeds: float | None  # standard deviation over seeds, averaged over splits
    over_splits: float | None  # standard deviation over splits, of the means over seeds
    seeds: int  # how many of a split, at most
    splits: int  # how many there are; 0 where the data set has its own
    trainings: int  # how many there are
    evaluations: int  # how many late epochs at least
    epochs: int  # to the end of training, the longest
    converged: int  # how many of the trainings converged
    beside: Mapping[str, float]  # further metrics by name


def measured(results: Results, case: Case, wanted: Settings, metric: str, beside: Sequence[str]) -> Cell | None:
    """Return what the results say about one class, over all seeds and splits; ``None`` without any.

    Splits may have been measured with differently many seeds: the mean is that of the splits' means.
    """
    name = metric if metric.startswith("image_") else f"{case.view.name}/{metric}"
    found = {
        (str(stored.split), stored.seed): result
        for stored, result in results
        if stored.repeated == wanted.repeated and covers(stored, wanted)
    }
    if not found:
        return None
    figures = {key: _metric(result, name) for key, result in found.items()}
    by_split: dict[str, list[float]] = {}
    for (split, _), figure in sorted(figures.items()):
        by_split.setdefault(split, []).append(100 * figure["mean"])
    means = [statistics.fmean(seeds) for seeds in by_split.values()]
    return Cell(
        mean=statistics.fmean(means),
        over_epochs=_mean([100 * figure["std"] for figure in figures.values() if figure["std"] is not None]),
        over_seeds=_mean([statistics.stdev(seeds) for seeds in by_split.values() if len(seeds) > 1]),
        over_splits=statistics.stdev(means) if len(means) > 1 else None,
        seeds=max(map(len, by_split.values())),
        splits=0 if wanted.split is None else len(means),
        trainings=len(figures),
        evaluations=min(len(figure["values"]) for figure in figures.values()),
        epochs=max(result["epochs"] for result in found.values()),
        converged=sum(result["converged_after"] is not None for result in found.values()),
        beside={
            other: statistics.fmean(100 * _metric(result, other)["mean"] for result in found.values())
            for other in beside
        },
    )


def _mean(deviations: Sequence[float]) -> float | None:
    return statistics.fmean(deviations) if deviations else None


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
    for case in table.cells:
        lines += _section(table, case, results)
    lines += [f"- {method}: not measured, {reason}." for method, reason in table.missing.items()]
    lines += [f"- {name} failed: {reason}" for name, reason in failures.items()]
    competitors = [row for row in published.rows if row.method not in {case.method for case in table.plan.cases}]
    if competitors:
        lines += ["", "Other methods, as the paper has them: " + ", ".join(map(_summary, competitors)) + "."]
    if published.notes:
        lines += ["", "About the published figures:", "", *(f"- {note}" for note in published.notes)]
    return "\n".join([*lines, "", *_conditions(table)]) + "\n"


def _section(table: Reproduction, case: Case, results: Results) -> list[str]:
    """Return a row of the paper's table: what was asked for of it, and what was measured before."""
    row, beside = table.published.row(case.method), table.plan.beside
    wanted = table.columns if case.method in table.rows else ()
    cells = {
        column: cell
        for column, settings in table.cells[case].items()
        if (cell := measured(results, case, settings, table.published.metric, beside)) or column in wanted
    }
    if not cells:
        return []
    figures = dict(zip(table.published.columns, row.values, strict=True))
    spreads = dict(zip(table.published.columns, row.spread or [None] * len(figures), strict=True))
    head = ["", "published", *OURS, *beside]
    first = next(iter(table.cells[case].values()))
    rows = [
        [
            column,
            _number(figures[column]) + (f" ± {spreads[column]}" if spreads[column] is not None else ""),
            *(_ours(cell, figures[column], first.model) if cell else ["–"] * (len(head) - 2)),
        ]
        for column, cell in cells.items()
    ]
    done = {column: cell.mean for column, cell in cells.items() if cell is not None}
    if len(cells) > 1 and done and not table.plan.per_column:
        means = _means(row, done, figures)
        rows.append([*means, *[""] * (len(head) - len(means))])
    text = markdown(head, rows)
    return [f"## {case.method}", "", f"Critical points {', '.join(first.critical_points)}; {_parts(first)}.", "", text]


def _parts(settings: Settings) -> str:
    """Return in words what else of the model decides a row's figures."""
    if settings.model == "dual":
        return "the dual model, not the paper's"
    parts = [f"cloner {settings.cloner}", f"terms {settings.terms}"]
    parts += [f"value weight {settings.value_weight}"] if settings.terms == "total" else []
    parts += [f"scored at {', '.join(settings.score_points)}"] if settings.score_points else []
    parts += ["each channel of the source in units of its root mean square"] if settings.scale_channels else []
    return "; ".join(parts)


def _means(row: Row, ours: Mapping[str, float], figures: Mapping[str, float | None]) -> list[str]:
    """Return the line of means: the published one where all classes were measured, else that of the same classes."""
    whole = len(ours) == len(figures)
    known = [value for column in ours if (value := figures[column]) is not None]
    theirs, mean = row.mean if whole else statistics.fmean(known), statistics.fmean(ours.values())
    name = "**mean**" if whole else f"**mean of these {len(ours)}**"
    return [name, _number(theirs), _number(mean), "", "", "", _difference(mean, theirs)]


def _ours(cell: Cell, theirs: float | None, model: str) -> list[str]:
    late, converged = _spread(cell.over_epochs, cell.evaluations), f"{cell.converged} of {cell.trainings}"
    if model == "dual":  # its training ends with its cycle
        late = converged = "–"
    spreads = [late, _spread(cell.over_seeds, cell.seeds), _spread(cell.over_splits, cell.splits)]
    state = [str(cell.epochs), converged]
    return [_number(cell.mean), *spreads, _difference(cell.mean, theirs), *state, *map(_number, cell.beside.values())]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _spread(deviation: float | None, count: int) -> str:
    return f"{_number(deviation)} ({count})" if count else "–"


def _difference(ours: float, theirs: float | None) -> str:
    return "–" if theirs is None else f"{ours - theirs:+.2f}"


def _summary(row: Row) -> str:
    figure = row.mean if row.mean is not None else " / ".join("–" if v is None else str(v) for v in row.values)
    return f"{row.method} {figure}"


def _conditions(table: Reproduction) -> list[str]:
    """Return under which conditions the figures stand."""
    every = [settings for columns in table.cells.values() for settings in columns.values()]
    first = every[0]
    size = " x ".join(map(str, first.image_size))
    weights = first.weights or ("published weights" if first.pretrained else "random weights")
    evaluated = (
        f"figures are means over up to {first.evaluations} late epochs, {first.interval} apart, never of a best one."
        if first.evaluations > 1
        else "figures are of one evaluation, after the last epoch."
    )
    lines = [
        f"Source {first.source} ({weights}, SHA-256 {first.weights_sha256[:12]}), images of {size} pixels, "
        f"{'with' if first.imagenet_normalization else 'without'} the source's normalisation, batches of "
        f"{first.batch_size}; {evaluated} Each ± is a sample standard deviation over what it is named after, in "
        "brackets how many there are."
    ]
    lines += [BESIDE[name] for name in table.plan.beside if name in BESIDE]
    if first.epochs is not None:
        lines.append(f"Training was limited to {first.epochs} epochs.")
    if first.precision != "32-true":
        lines.append(f"Precision of training: {first.precision}; of scores, too, but for those beside gradient maps.")
    if first.limit is not None:
        lines.append(f"A short run: {first.limit} training images, {first.limit} test images of either kind.")
    return lines
