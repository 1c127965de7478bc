"""Reproduce tables of arXiv 2011.11108: our figures beside the published ones, class by class.

python benchmarks/reproduce.py --table 2 --dataset mnist --classes 3 8

See docs/reproduce.md.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import get_args

from kd_multiresolution.dual.torch_model import STRIDES, check_dual_image_size
from kd_multiresolution.paper.presets import BATCH_SIZE
from kd_multiresolution.paper.value_weight import checked_value_weight
from kd_multiresolution.plugin.arguments import check_seed
from kd_multiresolution.source.images import check_image_size
from kd_multiresolution.source.network import Source
from kd_multiresolution.source.stages import levels_of_strides, score_points_of
from reporting import in_a_line, make_folder, natural, positive, quiet
from reproduction.data import DATASETS
from reproduction.experiment import fingerprint, run, state_file
from reproduction.rendering import render
from reproduction.results import Results
from reproduction.settings import Precision, Settings, View, united
from reproduction.tables import PLANS, Reproduction, reproduction

logger = logging.getLogger("reproduce")

PRECISIONS = get_args(Precision)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is not done yet, write the tables, and return how many trainings failed."""
    options = parser().parse_args(arguments)
    try:
        # The source comes first: without its weights nothing else is worth starting.
        sources = {seed: _source(options, seed) for seed in options.seeds}
        digests = {seed: fingerprint(source) for seed, source in sources.items()}
        source = sources[options.seeds[0]]
        base = shared_settings(options, source)
        tables = [
            reproduction(number, options.dataset, options.classes, base, options.rows) for number in options.table
        ]
        if options.rows:
            check_rows(options.rows, tables)
        wanted = trainings(tables, digests, options.splits)
        if not wanted:
            msg = f"--rows={options.rows}, --classes={options.classes}: no table has such a row of such a class."
            raise ValueError(msg)
        check = check_dual_image_size if options.model == "dual" else check_image_size
        for settings in wanted:
            check(settings.image_size, source)
        if options.splits != [0] and all(settings.split is None for settings in wanted):
            msg = f"--splits={options.splits}: only BrainMRI and HeadCT, Table 6, are split at random. Leave it out."
            raise ValueError(msg)
        results = Results(options.output / "trainings")
        todo = [settings for settings in wanted if not is_done(settings, results, options.checkpoints)]
    except (RuntimeError, ValueError) as error:
        raise SystemExit(f"{error}") from error
    make_folder("--output", options.output)
    if options.checkpoints is not None:
        make_folder("--checkpoints", options.checkpoints)
    failures: dict[Settings, str] = {}
    numbers = ", ".join(map(str, options.table))
    print(f"Table {numbers}, source {source}: {len(todo)} trainings to do; results in {results.folder}.")
    quiet()
    for number, settings in enumerate(todo, 1):
        print(f"{number} of {len(todo)}: {settings.name}")
        root = options.root
        if root is not None and DATASETS[settings.dataset].splits:
            root /= settings.dataset  # Table 6 has two data sets, side by side
        try:
            result = run(settings, options.source_weights, root, options.workers, options.checkpoints)
            print(f"{results.write(settings, result)}, {result['seconds']:.0f} s")
            if options.checkpoints is not None:
                with suppress(OSError):  # what is left of a state does no harm: the result is there
                    state_file(settings, options.checkpoints).unlink()
        except Exception as error:
            logger.exception("%s failed; the next one follows.", settings.name)
            failures[settings.training] = in_a_line(error)
        write(tables, results, digests, failures, options)  # so that an interrupted run leaves what is done
    print(*write(tables, results, digests, failures, options), sep="\n")
    return len(failures)


def is_done(settings: Settings, results: Results, checkpoints: Path | None) -> bool:
    """Whether a training has its result and, where models are to be kept, its model."""
    stored = results.find(settings)
    return stored is not None and (checkpoints is None or (checkpoints / f"{stored.stem}.ckpt").exists())


def _source(options: argparse.Namespace, seed: int) -> Source:
    """Return the source of a seed's trainings; only random weights depend on the seed.

    Raises:
        ValueError: if weights are given, and random ones asked for.
    """
    if options.source_weights and not options.pretrained:
        msg = f"--source-weights={options.source_weights}: --no-pretrained asks for random ones. Leave out one of them."
        raise ValueError(msg)
    points = options.critical_points
    if points is None and options.model == "dual":
        points = levels_of_strides(options.source, STRIDES)
    return Source(
        options.source,
        pretrained=options.pretrained,
        weights=options.source_weights,
        critical_points=points,
        seed=seed,
    )


def write(
    tables: Sequence[Reproduction],
    results: Results,
    digests: Mapping[int, str],
    failures: Mapping[Settings, str],
    options: argparse.Namespace,
) -> list[str]:
    """Write the tables, and return their text."""
    texts = []
    for table in tables:
        own = [settings.training for settings in trainings([table], digests, options.splits)]
        failed = {f"{s.name} at {', '.join(s.critical_points)}": failures[s] for s in own if s in failures}
        texts.append(render(table, results, failed))
        parts = ["table", str(table.number)]
        parts += [table.dataset] if len(table.plan.datasets) > 1 and table.dataset else []
        parts += [options.model] if options.model != "paper" else []
        parts += [f"{options.image_size}px"] if options.image_size else []
        parts += [f"limit{options.limit}"] if options.limit else []  # a look must not take a measurement's place
        (options.output / f"{'_'.join(parts)}.md").write_text(texts[-1])
    return texts


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--table", type=int, nargs="+", required=True, choices=PLANS, help="numbers of the tables")
    add("--dataset", choices=DATASETS, help="where the tables can be measured on several")
    add("--classes", nargs="+", metavar="CLASS", help="names or numbers of columns instead of all")
    add("--rows", nargs="+", metavar="ROW", help="names of rows instead of all, such as 'Dir Loss'")
    add("--seeds", nargs="+", type=seed, default=[0], help="of the cloner's weights and the order of the images")
    add("--splits", nargs="+", type=seed, default=[0], help="of BrainMRI and HeadCT: seeds of the held-out images")
    add("--root", type=Path, help="folder of the data; for Table 6 the one of brain_mri and head_ct")
    add("--output", type=Path, default=Path("results/reproduce"), help="folder of results and tables")
    add(
        "--checkpoints",
        type=Path,
        help="folder to keep the trained models in, and what an interrupted training goes on from",
    )
    add("--model", choices=["paper", "dual"], default="paper", help="dual: Tables 2, 3, 5, 6, evaluated at the end")
    add("--source", default="vgg16.tv_in1k", help="the frozen network")
    add("--source-weights", type=Path, help="its weight file instead of a download")
    add("--pretrained", action=argparse.BooleanOptionalAction, default=True, help="trained weights, or random ones")
    add("--critical-points", nargs="+", metavar="POINT", help="instead of the model's own")
    add("--score-points", nargs="+", metavar="POINT", help="those that make up score and map, instead of the model's")
    add("--scale-channels", action="store_true", help="bring each channel of the source to a mean square of one")
    add("--value-weight", type=value_weight, help="of the value term, or auto, instead of the preset's")
    add("--image-size", type=positive, help="pixels, instead of the preset's size and cut")
    add("--imagenet-normalization", action=argparse.BooleanOptionalAction, help="instead of the preset's choice")
    add("--batch-size", type=positive, default=BATCH_SIZE, help="images per training step")
    add("--evaluations", type=positive, default=5, help="late epochs to average")
    add("--interval", type=positive, default=10, help="epochs from one evaluation to the next")
    add("--epochs", type=positive, help="upper limit of a training, instead of the preset's")
    add(
        "--precision",
        choices=PRECISIONS,
        default="32-true",
        help="of training, and of scores without a gradient map",
    )
    add("--limit", type=positive, help="training images, and test images of either kind, for a short run")
    add("--workers", type=natural, default=0, help="loader processes")
    return parser


def value_weight(text: str) -> float | str:
    """Return a factor of the value term, or ``auto``."""
    weight: float | str = text
    with suppress(ValueError):  # `auto`, or what is refused
        weight = float(text)
    try:
        checked_value_weight(weight)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return weight


def seed(text: str) -> int:
    """Return a seed."""
    try:
        check_seed("seed", number := natural(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return number


def shared_settings(options: argparse.Namespace, source: Source) -> dict[str, object]:
    """Return what all trainings of a call have in common; where nothing is said, the preset rules.

    Raises:
        ValueError: if the dual model is given what only the paper's has, or a score point is no critical point.
    """
    of_paper = {
        "--score-points": options.score_points,
        "--scale-channels": options.scale_channels,
        "--value-weight": options.value_weight,
    }
    if options.model == "dual" and (given := [name for name, value in of_paper.items() if value]):
        msg = f"{', '.join(given)}: --model=dual has no such parts. Leave out what it has not."
        raise ValueError(msg)
    form = {
        "epochs": options.epochs,
        "image_size": (options.image_size, options.image_size) if options.image_size else None,
        "imagenet_normalization": options.imagenet_normalization,
        "value_weight": options.value_weight,
        "score_points": score_points_of(source.critical_points, options.score_points) if options.score_points else None,
    }
    return {
        **{name: value for name, value in form.items() if value is not None},
        "source": options.source,
        "pretrained": options.pretrained,
        "weights": options.source_weights.name if options.source_weights else None,
        "weights_sha256": fingerprint(source),
        "critical_points": source.critical_points,
        "scale_channels": options.scale_channels,
        "batch_size": options.batch_size,
        "evaluations": options.evaluations if options.model == "paper" else 1,
        "interval": options.interval if options.model == "paper" else 1,
        "limit": options.limit,
        "precision": options.precision,
        "model": options.model,
    }


def check_rows(rows: Sequence[str], tables: Sequence[Reproduction]) -> None:
    """Check that each row can be measured, and that each table has one of them.

    Raises:
        ValueError: if not.
    """
    missing = {row: reason for table in tables for row, reason in table.missing.items()}
    known = dict.fromkeys(case.method for table in tables for case in table.cells)
    for row in rows:
        if row in missing:
            msg = f"--rows={row!r}: it cannot be measured, {missing[row]}."
            raise ValueError(msg)
        if row not in known:
            msg = f"--rows={row!r}: expected some of {', '.join(map(repr, known))}."
            raise ValueError(msg)
    for table in tables:
        if not table.rows:
            msg = f"--rows={', '.join(map(repr, rows))}: Table {table.number} has no such row. Leave the table out."
            raise ValueError(msg)


def trainings(tables: Sequence[Reproduction], digests: Mapping[int, str], splits: Sequence[int]) -> list[Settings]:
    """Return the trainings of the tables, each once, read in every way that a row of theirs needs.

    Splits and seeds come one after the other, so that an interrupted run has measured all columns a few times.

    Args:
        tables: what is to be measured.
        digests: SHA-256 of the source's tensors by seed.
        splits: seeds of the held-out images, for the data sets that have them.
    """
    cells = [
        settings
        for table in tables
        for case, columns in table.cells.items()
        for column, settings in columns.items()
        if case.method in table.rows and column in table.columns
    ]
    views: dict[Settings, list[View]] = {}
    for (seed, digest), split, settings in product(digests.items(), splits, cells):
        repeated = replace(
            settings.training,
            seed=seed,
            split=None if settings.split is None else split,
            weights_sha256=digest,
        )
        views.setdefault(repeated, []).extend(settings.views)
    return [replace(training, views=united(views)) for training, views in views.items()]


if __name__ == "__main__":
    raise SystemExit(1 if main() else 0)
