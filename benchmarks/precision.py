"""Train and score in every precision that Lightning offers, and compare the AUROC: on patches of the demo, CPU or GPU.

python benchmarks/precision.py --output precision

Writes ``precision.md`` and ``precision.json``: AUROC x 100 of images and pixels on raw scores, or the error with which
a precision is refused.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from anomalib.engine import Engine
from rich.progress import track

from comparison.candidates import WITHOUT_COMPONENTS
from comparison.experiment import TestPass
from kd_multiresolution import KdMultiresolution
from kd_multiresolution.data import TextureDefects

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true")
VARIANTS: dict[str, dict[str, Any]] = {
    "paper, gradient": {},
    "paper, discrepancy": {"anomaly_map": "discrepancy"},
    "dual": {"variant": "dual"},
}


def trial(arguments: dict[str, Any], precision: Any, epochs: int, accelerator: str) -> dict[str, Any]:
    """Return the metrics of one training, or the error."""
    model = KdMultiresolution(
        source="light_vgg", critical_points=["pool2", "pool3", "pool4"], image_size=64, epochs=epochs,
        **arguments, **WITHOUT_COMPONENTS,
    )  # fmt: skip
    test = TestPass()
    with TemporaryDirectory() as folder:
        engine = Engine(
            default_root_dir=folder, precision=precision, callbacks=[test], limit_val_batches=0, logger=False,
            accelerator=accelerator, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        data = TextureDefects(num_workers=0)
        try:
            engine.fit(model, datamodule=data)
            engine.test(model, datamodule=data, verbose=False)
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    return test.metrics()


def markdown(table: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Return a row per precision."""
    lines = ["| precision | " + " | ".join(VARIANTS) + " |", "|---" * (1 + len(VARIANTS)) + "|"]
    for precision, row in table.items():
        cells = [
            found.get("error") or f"{100 * found['image_AUROC']:.1f} / {100 * found['pixel_AUROC']:.1f}"
            for found in row.values()
        ]
        lines.append("| " + " | ".join([precision, *cells]) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--output", type=Path, required=True, help="files to write, without suffix")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    table: dict[str, dict[str, dict[str, Any]]] = {}
    for precision in track(options.precisions, description="precision"):
        table[precision] = {
            name: trial(arguments, precision, options.epochs, options.accelerator)
            for name, arguments in VARIANTS.items()
        }
        print(precision, table[precision])
    options.output.with_suffix(".json").write_text(json.dumps(table, indent=1))
    options.output.with_suffix(".md").write_text(markdown(table))
    print(markdown(table))
