"""Reproduce a table of arXiv 2011.11108: our figures beside the published ones, class by class.

python benchmarks/reproduce.py --table 2 --dataset mnist --classes 3 8

See docs/reproduce.md.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kd_multiresolution.presets import BATCH_SIZE
from kd_multiresolution.source import Source
from reproduction.data import DATASETS
from reproduction.experiment import fingerprint, run
from reproduction.rendering import plot, render
from reproduction.results import Results
from reproduction.settings import Settings
from reproduction.tables import PLANS, Reproduction, reproduction

logger = logging.getLogger("reproduce")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is not done yet, write the table, and return how many trainings failed."""
    options = parser().parse_args(arguments)
    try:
        # The source comes first: without its weights nothing else is worth starting.
        source = Source(
            options.source,
            pretrained=options.pretrained,
            weights=options.source_weights,
            critical_points=options.critical_points,
        )
        table = reproduction(options.table, options.dataset, options.classes, shared_settings(options, source))
    except (RuntimeError, ValueError) as error:
        raise SystemExit(f"{error}") from error
    results = Results(options.output / "trainings")
    todo = [settings for settings in trainings(table, options.seeds, options.splits) if results.find(settings) is None]
    failures: dict[str, str] = {}
    console = Console()
    _say(console, f"Table {table.number}, source {source}: {len(todo)} trainings to do; results in {results.folder}.")
    # Once per training they would tell of chosen devices, of frozen modules and of each other's deprecations.
    warnings.filterwarnings("ignore", module=r"lightning\.")
    for name in ("lightning.pytorch", "lightning_fabric", "anomalib"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with progress_bar(console) as progress:
        task = progress.add_task("trainings", total=len(todo))
        for settings in todo:
            try:
                weights, root = options.source_weights, dataset_root(options.root, settings, table)
                result = run(settings, weights=weights, root=root, workers=options.workers, progress=progress)
                _say(console, f"{settings.name}: {results.write(settings, result)}, {result['seconds']:.0f} s")
            except Exception as error:
                logger.exception("%s failed; the next one follows.", settings.name)
                failures[settings.name] = f"{type(error).__name__}: {error}".splitlines()[0]
            progress.advance(task)
    stem = f"table_{table.number}" + (f"_{table.dataset}" if len(table.plan.datasets) > 1 and table.dataset else "")
    text = render(table, results, failures)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"{stem}.md").write_text(text)
    plot(table, results, options.output / f"{stem}.png")
    _say(console, text)
    return len(failures)


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--table", type=int, required=True, choices=PLANS, help="number of the table")
    add("--dataset", choices=DATASETS, help="where the table can be measured on several")
    add("--classes", nargs="+", metavar="CLASS", help="names or numbers of columns instead of all")
    add("--seeds", nargs="+", type=int, default=[0], help="of the cloner's weights and the order of the images")
    add("--splits", nargs="+", type=int, default=[0], help="of BrainMRI and HeadCT: seeds of the held-out images")
    add("--root", type=Path, help="folder of the data; for Table 6 the one of brain_mri and head_ct")
    add("--output", type=Path, default=Path("results/reproduce"), help="folder of results and tables")
    add("--source", default="vgg16.tv_in1k", help="the frozen network")
    add("--source-weights", type=Path, help="its weight file instead of a download")
    add("--pretrained", action=argparse.BooleanOptionalAction, default=True, help="trained weights, or random ones")
    add("--critical-points", nargs="+", metavar="POINT", help="instead of the source's last four")
    add("--image-size", type=int, help="pixels, instead of the preset's size and cut")
    add("--imagenet-normalization", action=argparse.BooleanOptionalAction, help="instead of the preset's choice")
    add("--batch-size", type=positive, default=BATCH_SIZE, help="images per training step")
    add("--evaluations", type=positive, default=5, help="late epochs to average, ten epochs apart")
    add("--epochs", type=positive, help="upper limit of a training, for a short run")
    add("--limit", type=positive, help="training images, and test images of either kind, for a short run")
    add("--workers", type=int, default=0, help="loader processes")
    return parser


def positive(text: str) -> int:
    """Return a number of 1 or more."""
    number = int(text)
    if number < 1:
        msg = f"{text}: expected 1 or more."
        raise argparse.ArgumentTypeError(msg)
    return number


def shared_settings(options: argparse.Namespace, source: Source) -> dict[str, object]:
    """Return what all trainings of a call have in common; where nothing is said, the preset rules."""
    form = {
        "image_size": (options.image_size, options.image_size) if options.image_size else None,
        "imagenet_normalization": options.imagenet_normalization,
    }
    return {
        **{name: value for name, value in form.items() if value is not None},
        "source": options.source,
        "pretrained": options.pretrained,
        "weights": options.source_weights.name if options.source_weights else None,
        "weights_sha256": fingerprint(source),
        "critical_points": source.critical_points,
        "batch_size": options.batch_size,
        "epochs": options.epochs,
        "evaluations": options.evaluations,
        "limit": options.limit,
    }


def trainings(table: Reproduction, seeds: Sequence[int], splits: Sequence[int]) -> list[Settings]:
    """Return the trainings of a table, each once: rows may share one."""
    cells = [settings for columns in table.cells.values() for settings in columns.values()]
    repeated = [
        replace(settings, seed=seed, split=split)
        for settings in cells
        for split in (splits if settings.split is not None else [None])
        for seed in seeds
    ]
    return list(dict.fromkeys(repeated))


def dataset_root(root: Path | None, settings: Settings, table: Reproduction) -> Path | None:
    """Return the folder of a training's data set."""
    return root / settings.dataset if root is not None and table.plan.per_column else root


def progress_bar(console: Console) -> Progress:
    """Return the display of trainings and epochs."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)


if __name__ == "__main__":
    raise SystemExit(1 if main() else 0)
