"""Compare exported models with torch: score and map, in ONNX Runtime and OpenVINO, on real, random and flat pictures.

python benchmarks/export_parity.py --checkpoint model.ckpt --sources vgg16 vgg16_bn --category bottle --output parity

Writes ``parity.json`` and ``parity.md``: for every model, map and runtime, over batches of 1, 2 and 5, the largest
difference of scores, the smallest correlation of maps, and the share of pixels within 1e-3 of the map's range, of all
pictures and of the worst. Models of ``--sources`` have random weights.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import openvino
import torch
from anomalib.data import MVTecAD
from rich.progress import track
from torch import Tensor

from kd_multiresolution import KdMultiresolution
from run_exported import Model, load

MAPS = (
    ("gradient", "both"),
    ("gradient", "cloner"),
    ("guided_backprop", "both"),
    ("guided_backprop", "cloner"),
    ("discrepancy", "-"),
)
BATCHES = (1, 2, 5)
COLUMNS = ("score difference", "map correlation", "pixels within 1e-3", "in the worst picture")
ROUNDING = 1e-6  # how far a map may be from one that is the same everywhere
SIZE = 128  # of models with random weights, in pixels


def pictures(data: MVTecAD) -> dict[str, Tensor]:
    """Return five pictures of each kind, (5, 3, H, W) in [0, 1]."""
    data.setup()
    (real, *_) = [batch.image.as_subclass(Tensor) for batch in data.test_dataloader()]
    noise = torch.rand(real.shape, generator=torch.Generator().manual_seed(0))
    flat = torch.linspace(0, 1, len(real))[:, None, None, None].expand_as(real)
    return {"real": real, "random": noise, "flat": flat}


def compared(run: Model, model: KdMultiresolution, images: Tensor) -> tuple[float, float, list[float]]:
    """Return the largest difference of scores, the smallest correlation, and each picture's share of equal pixels."""
    with torch.no_grad():
        expected = model(images)
    ours = run(np.ascontiguousarray(images))
    difference = np.abs(ours["pred_score"].ravel() - expected.pred_score.numpy().ravel()).max()
    correlations, shares = [], []
    for mine, reference in zip(ours["anomaly_map"], expected.anomaly_map.numpy(), strict=True):
        span = np.ptp(reference)
        # On a black picture a map can be flat: then there is no correlation, and no range.
        correlations.append(np.corrcoef(mine.ravel(), reference.ravel())[0, 1] if span > 0 else 1.0)
        shares.append(float((np.abs(mine - reference) <= (1e-3 * span or ROUNDING)).mean()))
    return float(difference), float(min(correlations)), shares


def models(checkpoint: Path | None, sources: list[str]) -> dict[str, KdMultiresolution]:
    """Return the checkpoint's model and untrained ones, by source."""
    found = {}
    if checkpoint:
        trained = KdMultiresolution.load_from_checkpoint(checkpoint).eval()
        found[f"{trained.hparams['source']}, trained"] = trained
    for source in sources:
        found[source] = KdMultiresolution(source, pretrained=False, image_size=SIZE).eval()
    return found


def rows(name: str, model: KdMultiresolution, kinds: dict[str, Tensor], folder: Path) -> list[dict[str, float | str]]:
    """Return one row per map, runtime and kind of picture; exported models go to the folder."""
    table: list[dict[str, float | str]] = []
    for method, path in track(MAPS, description=name):
        model.model.anomaly_map = method
        model.model.attribution_path = "both" if path == "-" else path
        onnx = model.to_onnx(folder, f"{method}_{path}")
        xml = folder / f"{method}_{path}.xml"
        openvino.save_model(openvino.convert_model(onnx), xml, compress_to_fp16=False)
        for runtime, run in (("ONNX Runtime", load(onnx)[0]), ("OpenVINO", load(xml)[0])):
            for kind, images in kinds.items():
                figures = [compared(run, model, images[:batch]) for batch in BATCHES]
                differences, correlations, shares = zip(*figures, strict=True)
                every = np.concatenate(shares)
                found = (max(differences), min(correlations), float(every.mean()), float(every.min()))
                settings = {"source": name, "map": f"{method}, {path}", "runtime": runtime, "pictures": kind}
                table.append({**settings, **dict(zip(COLUMNS, found, strict=True))})
    return table


def markdown(table: list[dict[str, float | str]]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| " + " | ".join(table[0]) + " |", "|---" * len(table[0]) + "|"]
    for row in table:
        names = [str(row[name]) for name in ("source", "map", "runtime", "pictures")]
        figures = [f"{row[COLUMNS[0]]:.1e}", f"{row[COLUMNS[1]]:.6f}", *(f"{row[name]:.4f}" for name in COLUMNS[2:])]
        lines.append("| " + " | ".join([*names, *figures]) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, help="checkpoint of a trained model")
    parser.add_argument("--sources", nargs="*", default=[], help="sources of models with random weights")
    parser.add_argument("--root", type=Path, default=Path("datasets/MVTecAD"), help="folder of MVTec AD")
    parser.add_argument("--category", default="bottle", help="category of MVTec AD")
    parser.add_argument("--output", type=Path, required=True, help="files to write, without suffix")
    arguments = parser.parse_args()
    kinds = pictures(MVTecAD(arguments.root, arguments.category, eval_batch_size=max(BATCHES), num_workers=0))
    table = []
    for name, model in models(arguments.checkpoint, arguments.sources).items():
        with tempfile.TemporaryDirectory() as folder:
            table += rows(name, model, kinds, Path(folder))
    arguments.output.with_suffix(".json").write_text(json.dumps(table, indent=1))
    arguments.output.with_suffix(".md").write_text(markdown(table))
    print(markdown(table))
