"""Compare both models with anomalib's STFPM, PaDiM and PatchCore: same images, backbone, size, machine, in one run.

``published`` is the paper's model as the paper has it, with its own source, VGG-16.

python benchmarks/peers.py --data datasets/MVTecAD --categories bottle pill screw --seeds 0 1 2 --output results/peers

Every fit has a process of its own, one at a time; metrics come from raw scores. One JSON file per fit is kept in the
output's folder, and what is there is not done again. Trained models of the first category and seed are then timed in
turn. Writes ``peers.md``, ``peers.json``, and with ``--curve`` a plot per category.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.progress import track

from comparison import experiment, hub_cache, inference
from comparison.candidates import CANDIDATES, LABELS
from comparison.rendering import curves, trials_table
from comparison.trial import Trial
from reporting import in_a_line, in_own_process, make_folder, natural, positive, write_whole
from runtimes import DEVICES, RUNTIMES, inference_table

logger = logging.getLogger("peers")


def planned(options: argparse.Namespace) -> list[Trial]:
    """Return all trials of the command.

    Raises:
        SystemExit: if a file of weights cannot be read.
    """
    names = [name for name in options.models if name not in left_out(options)]
    try:
        digests = {file: hub_cache.sha256(file) for _, _, file in weight_files(options)}
    except OSError as error:
        msg = f"{error.filename}: this file of weights cannot be read ({error.strerror})."
        raise SystemExit(msg) from error
    return [
        trial(options, name, category, limit, seed, digests)
        for category, limit, seed in product(options.categories, options.train_limit, options.seeds)
        for name in names
    ]


def trial(
    options: argparse.Namespace, name: str, category: str, limit: int | None, seed: int, digests: Mapping[Path, str]
) -> Trial:
    """Return one of them."""
    candidate = CANDIDATES[name]
    layers = options.patchcore_layers if name == "patchcore" else candidate.layers or options.layers
    return Trial(
        model=name, category=category, seed=seed, image_size=options.image_size, train_limit=limit,
        epochs=dict(options.epochs).get(name, candidate.epochs), batch_size=candidate.batch_size,
        backbone=candidate.backbone or options.backbone, layers=tuple(layers), coreset_ratio=options.coreset_ratio,
        weights_sha256=digests.get(options.vgg16_weights if candidate.backbone else options.weights),
        threads=options.threads, curve=options.curve,
        imagenette=str(options.imagenette) if name == "efficient_ad" else None,
    )  # fmt: skip


def weight_files(options: argparse.Namespace) -> list[tuple[str, Sequence[str], Path]]:
    """Return the backbones that come from files, with the levels that are used, and the files."""
    published = CANDIDATES["published"]
    every = [
        (options.backbone, options.layers, options.weights),
        (published.backbone, published.layers, options.vgg16_weights),
    ]
    return [(backbone, layers, file) for backbone, layers, file in every if file]


def left_out(options: argparse.Namespace) -> dict[str, str]:
    """Return what cannot be trained with the files that were given, with the sentence that says so."""
    reasons = {}
    if not options.imagenette:
        reasons["efficient_ad"] = (
            "EfficientAD is left out: it needs ImageNette (`--imagenette`) and a teacher of its own."
        )
    if options.weights and not options.vgg16_weights:
        reasons["published"] = (
            "The paper's model with the paper's source is left out: from files, it needs its own (`--vgg16_weights`)."
        )
    return {name: reason for name, reason in reasons.items() if name in options.models}


def check_files(options: argparse.Namespace) -> None:
    """Check that weights come from files for all models, or for none.

    Raises:
        SystemExit: if only VGG-16's do, while other models have the shared backbone.
    """
    others = [name for name in options.models if not CANDIDATES[name].backbone and name not in left_out(options)]
    if options.vgg16_weights and not options.weights and others:
        msg = (
            f"--vgg16_weights without --weights: with a file, nothing is downloaded for {', '.join(others)} either. "
            "Give both, or --models published."
        )
        raise SystemExit(msg)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is not done yet, write tables and plots, and return how many trials failed."""
    options = parser().parse_args(arguments)
    check_files(options)
    trials = planned(options)
    output: Path = options.output
    make_folder("--output", output)
    results: dict[Trial, Any] = {}
    failures: dict[Trial, str] = {}
    timed = {trial.model: trial for trial in reversed(trials)}
    with TemporaryDirectory() as cache:
        for backbone, layers, weights in weight_files(options):
            try:
                hub_cache.fill(Path(cache), backbone, layers, weights)
            except ValueError as error:
                raise SystemExit(str(error)) from error
            hub_cache.use(Path(cache))
        for trial in track(trials, description="peers"):
            file, checkpoint = output / "trials" / f"{trial.stem}.json", checkpoint_of(trial, output)
            try:
                # A model that was not to be timed when it was trained has left no checkpoint.
                untimed = options.repetitions and trial in timed.values() and not checkpoint.exists()
                if not file.exists() or untimed:
                    write_whole(file, in_own_process(experiment.run, trial, options.data, checkpoint))
                    if trial not in timed.values():
                        checkpoint.unlink()
                results[trial] = json.loads(file.read_text())
            except Exception as error:
                logger.exception("%s failed; the next one follows.", trial.name)
                failures[trial] = in_a_line(error)
        timed = {name: trial for name, trial in timed.items() if trial in results}
        text = write(options, trials, results, failures, None)  # what is done stays if timing fails
        if options.repetitions and timed:
            text = write(options, trials, results, failures, inference_of(timed, options))
    print(text)
    return len(failures)


def checkpoint_of(trial: Trial, output: Path) -> Path:
    """Return the file of a trained model."""
    return output / "checkpoints" / f"{trial.stem}.ckpt"


def inference_of(timed: Mapping[str, Trial], options: argparse.Namespace) -> dict[str, Any]:
    """Time the trained models."""
    order = {name: timed[name] for name in options.models if name in timed}
    files = {name: checkpoint_of(trial, options.output) for name, trial in order.items()}
    settings = (options.runtimes, options.batches, options.repetitions, options.accelerator)
    return in_own_process(inference.measure, order, files, *settings)


def write(
    options: argparse.Namespace,
    trials: Sequence[Trial],
    results: Mapping[Trial, Any],
    failures: Mapping[Trial, str],
    speed: Mapping[str, Any] | None,
) -> str:
    """Write tables and plots, and return the tables."""
    weights = f"`{options.weights.name}`" if options.weights else "timm's own weights"
    text = (
        f"{options.backbone} with {weights}, levels {', '.join(options.layers)} (PatchCore: "
        f"{', '.join(options.patchcore_layers)}, {100 * options.coreset_ratio:g} % of the positions), "
        f"{options.image_size} x {options.image_size} pixels, {options.threads} threads. AUROC and AUPRO x 100 on raw "
        "scores, mean ± standard deviation over seeds; costs are medians."
    )
    if "published" in {trial.model for trial in trials}:
        own = f"`{options.vgg16_weights.name}`" if options.vgg16_weights else "timm's own weights"
        text += f" VGG-16 has {own}, its levels are {', '.join(CANDIDATES['published'].layers or ())}; it alone sees "
        text += "images that are not normalised, as in the paper."
    text += "\n\n" + trials_table(trials, results, failures)
    text += "".join(f"\n{reason}\n" for reason in left_out(options).values())
    stored: dict[str, Any] = {"trials": list(results.values())}
    plotted = [trial for trial in trials if trial.train_limit == options.train_limit[-1]]
    if speed is not None:
        text += f"\nInference, ratio to the backbone's forward pass alone:\n\n{inference_table(speed, LABELS)}"
        stored["inference"] = speed
    for category in options.categories if options.curve else ():
        curves(plotted, results, category, options.output / f"curve_{category}.png")
    (options.output / "peers.md").write_text(text)
    write_whole(options.output / "peers.json", stored)
    return text


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of MVTec AD")
    add("--categories", nargs="+", default=["bottle"])
    shared = [name for name, candidate in CANDIDATES.items() if candidate.backbone is None]  # VGG-16 takes hours
    add("--models", nargs="+", choices=CANDIDATES, default=shared)
    add("--seeds", nargs="+", type=natural, default=[0])
    add("--train_limit", nargs="+", type=_limit, default=[None], help="normal images, or all; the last is plotted")
    add("--epochs", nargs="+", type=_epochs, default=[], metavar="MODEL=N", help="instead of a model's own number")
    add("--image_size", type=positive, default=256, help="pixels per side")
    add("--backbone", default="resnet18", help="of timm")
    add("--layers", nargs="+", default=["layer1", "layer2", "layer3"], help="its feature levels")
    add("--patchcore_layers", nargs="+", default=CANDIDATES["patchcore"].layers, help="PatchCore's")
    add("--coreset_ratio", type=_share, default=0.01, help="share of the positions in PatchCore's memory")
    add("--weights", type=Path, help="the backbone's weight file, for all models, instead of a download")
    add("--vgg16_weights", type=Path, help="the same for the paper's source, which the published model has")
    add("--imagenette", type=Path, help="folder of ImageNette; without it EfficientAD is left out")
    add("--curve", type=positive, metavar="EPOCHS", help="test every so many epochs, outside the time of training")
    add("--batches", nargs="+", type=positive, default=[1, 8], help="images per run at inference")
    add("--repetitions", type=natural, default=15, help="of each run at inference; 0: no inference")
    add("--runtimes", nargs="+", choices=RUNTIMES, default=["torch"], help="of inference")
    add("--accelerator", choices=DEVICES, default="cpu", help="of inference in torch")
    add("--threads", type=positive, default=1, help="of the CPU")
    add("--output", type=Path, default=Path("results/peers"), help="folder of results, tables and plots")
    return parser


def _limit(text: str) -> int | None:
    return None if text == "all" else positive(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0
    if not 0 < share <= 1:
        msg = f"{text}: expected a share, above 0, 1 at most."
        raise argparse.ArgumentTypeError(msg)
    return share


def _epochs(text: str) -> tuple[str, int]:
    name, _, number = text.partition("=")
    if name not in CANDIDATES or not number.isdigit():
        msg = f"{text}: expected MODEL=N, MODEL one of {', '.join(CANDIDATES)}."
        raise argparse.ArgumentTypeError(msg)
    if int(number) < 1:
        msg = f"{text}: expected 1 epoch or more."
        raise argparse.ArgumentTypeError(msg)
    if CANDIDATES[name].epochs == 1:
        msg = f"{text}: {name} sees each image once."
        raise argparse.ArgumentTypeError(msg)
    return name, int(number)


if __name__ == "__main__":
    raise SystemExit(1 if main() else 0)
