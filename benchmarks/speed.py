"""Measure training: seconds per epoch, peak memory, and the step against its floor.

python benchmarks/speed.py --source vgg16 --sizes 128 --images 64 128 --batches 16 --output speed

Three ways to train the same cloner on the same pictures: ``cached`` (what the package does), ``uncached`` (the source
runs in every epoch) and ``published`` (the source is also back-propagated, as the paper's code does). Each fit has a
process of its own; they take turns, and a figure is the median over all epochs but the first of all turns. The floor of
a step is the cloner's forward and backward pass alone. Weights and pictures are random: they change no time. Writes a
JSON file, a Markdown table and a plot; ``--previous`` sets the figures beside those of an earlier JSON file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import multiprocessing
import resource
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, cast

import matplotlib.pyplot as plt
import torch
from anomalib.data import Folder, ImageBatch
from anomalib.engine import Engine
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.progress import track
from torch import Tensor
from torchvision.utils import save_image

from kd_multiresolution import KdMultiresolution, KdMultiresolutionModel, discrepancy
from kd_multiresolution.allocator import hold_freed_memory

WAYS = ("cached", "uncached", "published")


class EpochTimes(Callback):
    """Keeps the seconds of every training epoch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.start = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        del trainer, pl_module
        self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        del trainer, pl_module
        self.seconds.append(time.perf_counter() - self.start)


class PublishedTraining(KdMultiresolution):
    """Back-propagates through the source as well, whose weights stay as they are."""

    def training_step(self, batch: ImageBatch, *args: Any, **kwargs: Any) -> Tensor:
        """Return the mean discrepancy of the batch over all critical points."""
        del args, kwargs
        model = cast("KdMultiresolutionModel", self.model)
        images = model.checked_images(cast("Tensor", batch.image))
        features = model.source(images)
        return discrepancy(features, model.cloner(images), value_weight=model.known_value_weight).mean()


def write_pictures(root: Path, count: int, size: int) -> None:
    """Write as many random pictures."""
    (root / "good").mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        save_image(torch.rand(3, size, size, generator=generator), root / "good" / f"{i}.jpg")


def fit(way: str, case: dict[str, Any], root: str) -> dict[str, Any]:
    """Train, and return the seconds of every epoch and the peak memory in MiB of this process."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(case["threads"])
    kind = PublishedTraining if way == "published" else KdMultiresolution
    model = kind(
        source=case["source"], pretrained=False, critical_points=case["critical_points"], image_size=case["size"],
        epochs=case["epochs"], cache="float32" if way == "cached" else None, visualizer=False,
    )  # fmt: skip
    if way == "published":
        model.model.source.requires_grad_(requires_grad=True)
    data = Folder(
        "pictures", root=root, normal_dir="good", train_batch_size=case["batch"], num_workers=0,
        test_split_mode="none", val_split_mode="from_train", val_split_ratio=1 / case["images"],
    )  # fmt: skip
    times = EpochTimes()
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(
            default_root_dir=folder, logger=False, enable_progress_bar=False,
            enable_model_summary=False, accelerator=case["accelerator"], callbacks=[times], limit_val_batches=0,
        )  # fmt: skip
        engine.fit(model, datamodule=data)
    return {"seconds": times.seconds, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def step_seconds(case: dict[str, Any], repetitions: int = 5) -> dict[str, float]:
    """Return the median seconds of the source's forward pass and of the cloner's forward and backward pass."""
    torch.set_num_threads(case["threads"])
    hold_freed_memory()  # as in a fit
    model = KdMultiresolutionModel(case["source"], pretrained=False, critical_points=case["critical_points"]).train()
    images = model.checked_images(torch.rand(case["batch"], 3, case["size"], case["size"]))
    seconds: dict[str, list[float]] = {"source": [], "cloner": []}
    for _ in range(repetitions + 1):
        start = time.perf_counter()
        with torch.no_grad():
            model.source(images)
        middle = time.perf_counter()
        features = model.cloner(images)
        torch.autograd.backward(features, [torch.ones_like(feature) for feature in features])
        seconds["source"].append(middle - start)
        seconds["cloner"].append(time.perf_counter() - middle)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def measure(case: dict[str, Any], ways: list[str], turns: int) -> dict[str, Any]:
    """Return the case with its figures, in milliseconds per training image and MiB."""
    fits: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "pictures")
        write_pictures(root, case["images"] + 1, case["size"])
        for _, way in itertools.product(range(turns), ways):
            with ProcessPoolExecutor(1, context) as pool:  # unlike a Pool, it does not wait for a killed process
                fits[way].append(pool.submit(fit, way, case, str(root)).result())
    with ProcessPoolExecutor(1, context) as pool:
        steps = pool.submit(step_seconds, case).result()
    per_image = 1000 / case["images"]
    return {
        **case,
        "epoch_ms": {
            way: per_image * statistics.median([s for run in runs for s in run["seconds"][1:]])
            for way, runs in fits.items()
        },
        "first_epoch_ms": {
            way: per_image * statistics.median([run["seconds"][0] for run in runs]) for way, runs in fits.items()
        },
        "peak_mib": {way: max(run["peak_mib"] for run in runs) for way, runs in fits.items()},
        "floor_ms": {name: 1000 * seconds / case["batch"] for name, seconds in steps.items()},
    }


def markdown(rows: list[dict[str, Any]], previous: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    names = ["size", "images", "batch"]
    ways = [*rows[0]["epoch_ms"]]
    head = [*names, *(f"{way}, ms per image" for way in ways), f"{ways[0]} / floor", f"{ways[0]}, peak MiB", "before"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        times = row["epoch_ms"]
        before = [old for old in previous if all(old[name] == row[name] for name in ("source", *names))]
        against = f"x {times[ways[0]] / before[0]['epoch_ms'][ways[0]]:.2f}" if before else "-"
        cells = [*(str(row[name]) for name in names), f"{times[ways[0]]:.1f}"]
        cells += [f"{times[way]:.1f} (x {times[way] / times[ways[0]]:.1f})" for way in ways[1:]]
        cells += [f"{times[ways[0]] / row['floor_ms']['cloner']:.2f}", f"{row['peak_mib'][ways[0]]:.0f}", against]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw a bar for each way and case."""
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for offset, way in enumerate(rows[0]["epoch_ms"]):
        positions = [index + 0.27 * (offset - 1) for index in range(len(rows))]
        axes.bar(positions, [row["epoch_ms"][way] for row in rows], width=0.25, label=way)
    axes.set_xticks(
        range(len(rows)), [f"{row['size']} px\n{row['images']} images\nbatch {row['batch']}" for row in rows]
    )
    axes.set_ylabel("ms per training image and epoch")
    axes.set_title(rows[0]["source"])
    axes.legend()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", default="vgg16", help="model of timm, or light_vgg")
    parser.add_argument("--critical_points", nargs="+", help="default: the last four levels")
    parser.add_argument("--sizes", nargs="+", type=int, default=[128], help="pixels")
    parser.add_argument("--images", nargs="+", type=int, default=[64], help="training images")
    parser.add_argument("--batches", nargs="+", type=int, default=[16], help="images per step")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="the first one is the reference")
    parser.add_argument("--epochs", type=int, default=3, help="2 or more: the first one fills the cache")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--previous", type=Path, help="JSON file of an earlier run")
    parser.add_argument("--output", type=Path, required=True, help="files to write, without suffix")
    arguments = vars(parser.parse_args())
    previous = json.loads(arguments["previous"].read_text()) if arguments["previous"] else []
    common = {name: arguments[name] for name in ("source", "critical_points", "epochs", "threads", "accelerator")}
    cases = [
        {**common, "size": size, "images": images, "batch": batch}
        for size, images, batch in itertools.product(*(arguments[name] for name in ("sizes", "images", "batches")))
    ]
    rows = [measure(case, arguments["ways"], arguments["turns"]) for case in track(cases, description="speed")]
    output: Path = arguments["output"]
    output.with_suffix(".json").write_text(json.dumps(rows, indent=1))
    output.with_suffix(".md").write_text(markdown(rows, previous))
    plot(rows, output.with_suffix(".png"))
    print(markdown(rows, previous))
