"""Measure what training costs beside its floor, and inference beside the source's forward pass, on a CPU or a GPU.

python benchmarks/speed.py training --source vgg16 --size 128 --images 64 --batches 16 --output speed
python benchmarks/speed.py inference --source resnet18 --critical_points layer1 layer2 layer3 --output resnet18

Weights and pictures are random: they change no time. What is compared takes turns, so that a busy machine slows all of
it; figures are medians. Writes a JSON file and a Markdown table.

``training`` fits with the source's features kept, and with the source run in every epoch. Each fit has a process of its
own, and its first epoch does not count. The floor of a step is the cloners' forward and backward pass alone.
``inference`` runs the torch models, or what is exported from them, in several runtimes. Beside times stand counts of
operators, by which a GPU's time goes where the batch is small; they are the same on a CPU.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.progress import track
from torch import nn
from torchvision.utils import save_image

from kd_multiresolution import KdMultiresolution, KdMultiresolutionDual, KdMultiresolutionModel
from kd_multiresolution.dual.loss import cloner_losses
from kd_multiresolution.dual.torch_model import KdMultiresolutionDualModel
from kd_multiresolution.paper.discrepancy import discrepancy
from kd_multiresolution.plugin.allocator import hold_freed_memory
from kd_multiresolution.training.optimizer import Muon, adam
from operators import operators
from reporting import in_own_process, markdown, now, peak_mib, quiet, write_both
from runtimes import DEVICES, EXPORTED, RUNTIMES, inference_table, measure

READINGS: Mapping[str, Mapping[str, Any]] = {
    "score": {"anomaly_map": None},
    "discrepancy": {"anomaly_map": "discrepancy"},
    "gradient, cloner": {"attribution_path": "cloner"},
    "gradient, both": {"attribution_path": "both"},
}
DUAL = "dual"
WAYS = ("cached", "uncached")


class EpochTimes(Callback):
    """Keeps the seconds of every training epoch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.start = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        del trainer, pl_module
        self.start = now()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        del trainer, pl_module
        self.seconds.append(now() - self.start)


def write_pictures(root: Path, count: int, size: int) -> None:
    """Write as many random pictures."""
    (root / "good").mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        save_image(torch.rand(3, size, size, generator=generator), root / "good" / f"{i}.jpg")


def fit(case: Mapping[str, Any], cached: bool, root: Path) -> dict[str, Any]:
    """Train, and return the seconds of every epoch and the peak memory of this process."""
    quiet()
    torch.set_num_threads(case["threads"])
    model = (KdMultiresolutionDual if case["model"] == DUAL else KdMultiresolution)(
        source=case["source"], pretrained=False, critical_points=case["critical_points"], image_size=case["size"],
        epochs=case["epochs"], cache="float32" if cached else None, visualizer=False,
    )  # fmt: skip
    data = Folder(
        "pictures", root=root, normal_dir="good", train_batch_size=case["batch"], num_workers=0,
        test_split_mode="none", val_split_mode="from_train", val_split_ratio=1 / case["images"],
    )  # fmt: skip
    times = EpochTimes()
    with tempfile.TemporaryDirectory() as folder:
        engine = Engine(
            default_root_dir=folder, logger=False, enable_progress_bar=False, enable_model_summary=False,
            accelerator=case["accelerator"], devices=1, callbacks=[times], limit_val_batches=0,
        )  # fmt: skip
        engine.fit(model, datamodule=data)
    return {"seconds": times.seconds, **peak_mib()}


def floor(case: Mapping[str, Any], repetitions: int = 5) -> dict[str, float]:
    """Return milliseconds per image of the source's forward pass and of the cloners' forward and backward pass."""
    torch.set_num_threads(case["threads"])
    hold_freed_memory()  # as in a fit
    kind = KdMultiresolutionDualModel if case["model"] == DUAL else KdMultiresolutionModel
    device = DEVICES[case["accelerator"]]
    model = kind(case["source"], pretrained=False, critical_points=case["critical_points"]).train().to(device)
    images = model.checked_images(torch.rand(case["batch"], 3, case["size"], case["size"], device=device))
    times: dict[str, list[float]] = {"source": [], "cloner": []}
    for _ in range(repetitions + 1):
        start = now()
        with torch.no_grad():
            features = model.source(images)
        middle = now()
        if isinstance(model, KdMultiresolutionDualModel):
            torch.autograd.backward(list(cloner_losses(model, features).values()))
        else:
            outputs = model.cloner(images)
            torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
        times["source"].append(middle - start)
        times["cloner"].append(now() - middle)
    return {name: 1000 * statistics.median(seconds[1:]) / case["batch"] for name, seconds in times.items()}


def step_operators(case: Mapping[str, Any]) -> int:
    """Return how many operators a training step on known features takes: forward, backward and optimiser."""
    kind = KdMultiresolutionDualModel if case["model"] == DUAL else KdMultiresolutionModel
    model = kind(case["source"], pretrained=False, critical_points=case["critical_points"]).train()
    images = model.checked_images(torch.rand(2, 3, case["size"], case["size"]))
    features = model.source(images)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer: torch.optim.Optimizer = Muon(weights, 1e-3) if case["model"] == DUAL else adam(weights, 1e-3)

    def step() -> None:
        optimizer.zero_grad()
        if isinstance(model, KdMultiresolutionDualModel):
            loss = torch.stack([*cloner_losses(model, features).values()]).sum()
        else:
            loss = discrepancy(features, model.cloner(images), value_weight=0.5).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return operators(step).total()


def trained(case: dict[str, Any], turns: int) -> dict[str, Any]:
    """Return the case with its figures, in milliseconds per training image and MiB."""
    fits: dict[str, list[dict[str, Any]]] = {way: [] for way in case["ways"]}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "pictures")
        write_pictures(root, case["images"] + 1, case["size"])
        for _, way in itertools.product(range(turns), fits):
            fits[way].append(in_own_process(fit, case, way == "cached", root))
    seconds = {way: [second for run in runs for second in run["seconds"][1:]] for way, runs in fits.items()}
    memory = "device_mib" if case["accelerator"] == "gpu" else "peak_mib"
    return {
        **case,
        "epoch_ms": {way: 1000 * statistics.median(times) / case["images"] for way, times in seconds.items()},
        "peak_mib": {way: max(run[memory] for run in runs) for way, runs in fits.items()},
        "floor_ms": in_own_process(floor, case),
        "operators": step_operators(case),
    }


def training(options: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    """Return a row per batch size, and the table."""
    cases = [{**vars(options), "batch": batch, "function": None, "output": None} for batch in options.batches]
    rows = [trained(case, options.turns) for case in track(cases, description="training")]
    first, *_ = options.ways
    columns = ("model", "size", "images", "batch")
    head = [*columns, *(f"{way}, ms per image" for way in options.ways), "source", "cloner: the floor"]
    cells = [
        [
            *(row[name] for name in columns),
            *(f"{row['epoch_ms'][way]:.2f}" for way in options.ways),
            *(f"{row['floor_ms'][part]:.2f}" for part in ("source", "cloner")),
            f"{row['epoch_ms'][first] / row['floor_ms']['cloner']:.2f}",
            f"{row['peak_mib'][first]:.0f}",
            row["operators"],
        ]
        for row in rows
    ]
    return rows, markdown([*head, f"{first} / floor", f"{first}, peak MiB", "operators per step"], cells)


def inference(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Return a row per runtime and batch, and the table."""
    points = options.critical_points
    models: dict[str, Any] = {}
    for name in options.readings:
        kind = KdMultiresolutionDualModel if name == DUAL else KdMultiresolutionModel
        model = kind(options.source, pretrained=False, critical_points=points, **READINGS.get(name, {}))
        models[name], points = model.eval(), model.source.critical_points
    models = {"source": cast("nn.Module", models[options.readings[0]].source), **models}
    found = measure(
        models, options.runtimes, options.size, options.batches, options.repetitions,
        threads=options.threads, accelerator=options.accelerator,
    )  # fmt: skip
    names = ("source", "critical_points", "threads", "repetitions", "accelerator")
    image = torch.rand(1, 3, options.size, options.size)
    with torch.no_grad():
        counts = {name: operators(model.to("cpu"), image).total() for name, model in models.items()}
    table = inference_table(found) + "\n" + markdown(["torch's operators", *counts], [["per image", *counts.values()]])
    return {**{name: getattr(options, name) for name in names}, **found, "operators": counts}, table


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True)
    for function, batches, threads in ((training, [16], 2), (inference, [1, 8], 1)):
        command = commands.add_parser(function.__name__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        command.set_defaults(function=function)
        add = command.add_argument
        add("--source", default="vgg16", help="model of timm, or efficientnet_lite0")
        add("--critical_points", nargs="+", help="default: the model's, or the first reading's, own")
        add("--size", type=int, default=128, help="pixels per side")
        add("--batches", nargs="+", type=int, default=batches, help="images per step or run")
        add("--threads", type=int, default=threads, help="of the CPU")
        add("--accelerator", choices=DEVICES, default="cpu")
        add("--output", type=Path, required=True, help="files to write, without suffix")
        if function is training:
            add("--model", choices=["paper", DUAL], default="paper")
            add("--images", type=int, default=64, help="training images")
            add("--ways", nargs="+", choices=WAYS, default=WAYS, help="the first is held against the floor")
            add("--epochs", type=int, default=3, help="2 or more: the first one fills the cache")
            add("--turns", type=int, default=2)
        else:
            add("--readings", nargs="+", choices=[*READINGS, DUAL], default=[*READINGS], help="what is computed")
            add("--runtimes", nargs="+", choices=RUNTIMES, default=["torch", *EXPORTED], help="exported: on the CPU")
            add("--repetitions", type=int, default=15)
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write JSON and table."""
    options = parser().parse_args(arguments)
    write_both(options.output, *options.function(options))


if __name__ == "__main__":
    main()
