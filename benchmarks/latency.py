"""Measure what score and anomaly map cost, as multiples of the source's forward pass alone in the same runtime.

python benchmarks/latency.py --source resnet18 --critical_points layer1 layer2 layer3 --output resnet18

Writes ``resnet18.json`` (medians, 95th percentiles, images per second) and ``resnet18.md``. Weights are random: they
change no time. Every repetition runs the source and all variants in turn, so that a busy machine slows all of them; a
ratio is the median of the repetitions' ratios.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import nn

from kd_multiresolution import KdMultiresolutionModel
from kd_multiresolution.dual import DualModel
from runtimes import EXPORTED, RUNTIMES, Outputs, export, measured, prepared, summary

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "score": {"anomaly_map": None},
    "discrepancy": {"anomaly_map": "discrepancy"},
    "gradient, cloner": {"attribution_path": "cloner"},
    "gradient, both": {"attribution_path": "both"},
}


def modules(source: str, critical_points: list[str] | None, variants: list[str]) -> dict[str, nn.Module]:
    """Return the source and the variants by name, all of the same critical points."""
    models: dict[str, Any] = {}
    for name in variants:
        settings: dict[str, Any] = {"pretrained": False, "critical_points": critical_points}
        if name == "dual":
            models[name] = DualModel(source, **settings)
        else:
            models[name] = KdMultiresolutionModel(source, **settings, **VARIANTS[name])
        critical_points = models[name].source.critical_points
    models = {"source": models[variants[0]].source, **models}
    return {name: Outputs(model).eval() for name, model in models.items()}


def rows(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Return one row per size, runtime and batch size; exported models go to the folder."""
    table = []
    candidates = modules(arguments.source, arguments.critical_points, arguments.variants)
    combinations = [(size, runtime) for size in arguments.sizes for runtime in arguments.runtimes]
    files: dict[tuple[int, str], Path] = {}
    for size, runtime in track(combinations, description="latency"):
        for name, module in candidates.items():
            if runtime in EXPORTED and (size, name) not in files:
                files[size, name] = folder / f"{size}_{len(files)}.onnx"
                export(module, torch.rand(2, 3, size, size), files[size, name])
        runs = {
            name: prepared(runtime, module, files.get((size, name), folder), arguments.threads)
            for name, module in candidates.items()
        }
        for batch in arguments.batches:
            seconds = measured(runs, torch.rand(batch, 3, size, size), arguments.repetitions)
            figures = {name: summary(times, seconds["source"], batch) for name, times in seconds.items()}
            table.append({"runtime": runtime, "size": size, "batch": batch, "figures": figures})
    return table


def markdown(table: list[dict[str, Any]], variants: list[str]) -> str:
    """Return the rows as a Markdown table."""
    lines = [
        "| runtime | size | batch | source, ms | " + " | ".join(variants) + " |",
        "|---" * (4 + len(variants)) + "|",
    ]
    for row in table:
        figures = row["figures"]
        ratios = " | ".join(f"{figures[name]['ratio']:.2f}" for name in variants)
        milliseconds = figures["source"]["median_ms"]
        lines.append(f"| {row['runtime']} | {row['size']} | {row['batch']} | {milliseconds:.1f} | {ratios} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", default="vgg16", help="model of timm, or light_vgg")
    parser.add_argument("--critical_points", nargs="+", help="default: the first variant's own")
    parser.add_argument("--variants", nargs="+", choices=[*VARIANTS, "dual"], default=[*VARIANTS])
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=["torch", *EXPORTED])
    parser.add_argument("--sizes", nargs="+", type=int, default=[128, 256], help="pixels")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="images")
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True, help="files to write, without suffix")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        table = rows(arguments, Path(folder))
    names = ("source", "critical_points", "threads", "repetitions")
    settings = {name: getattr(arguments, name) for name in names}
    arguments.output.with_suffix(".json").write_text(json.dumps({**settings, "rows": table}, indent=1))
    arguments.output.with_suffix(".md").write_text(markdown(table, arguments.variants))
    print(markdown(table, arguments.variants))
