"""Hold every kind of exported file against torch, on all test images of a category: parity, and what compression costs.

python benchmarks/export.py --checkpoint model.ckpt --category bottle --map discrepancy --output bottle

Writes ``bottle.json`` and ``bottle.md``: AUROC x 100 of images and pixels; the largest difference of a score, in
percent of the range of torch's; labels that differ, by torch's threshold; the mean and the smallest correlation of
maps; and the share of pixels within 1e-3 of the map's range, of all images and of the worst. INT8_PTQ is calibrated on
training images.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from anomalib.data import AnomalibDataModule, MVTecAD
from anomalib.deploy import CompressionType
from rich.progress import track
from torch import Tensor

from kd_multiresolution import KdMultiresolution, KdMultiresolutionDual
from kd_multiresolution.plugin.export_check import Array, Run, in_torch, runtimes
from kd_multiresolution.results.raw_metrics import Predictions, raw_metrics
from reporting import markdown, write_both

MODELS: Mapping[str, Any] = {"paper": KdMultiresolution, "dual": KdMultiresolutionDual}
FILES: Mapping[str, CompressionType | None] = {
    "ONNX": None,
    "OpenVINO": None,
    "OpenVINO, FP16": CompressionType.FP16,
    "OpenVINO, INT8": CompressionType.INT8,
    "OpenVINO, INT8_PTQ": CompressionType.INT8_PTQ,
}
ROUNDING = 1e-6  # how far a map may be from one that is the same everywhere


def answers(run: Run, data: AnomalibDataModule) -> dict[str, Array]:
    """Return a model's outputs for all test images by name."""
    parts = [run(np.ascontiguousarray(batch.image.as_subclass(Tensor))) for batch in data.test_dataloader()]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def compared(ours: Mapping[str, Array], reference: Mapping[str, Array]) -> dict[str, Any]:
    """Return how far outputs are from others of the same images."""
    scores, expected = ours["pred_score"].ravel(), reference["pred_score"].ravel()
    correlations, shares = [], []
    for mine, other in zip(ours["anomaly_map"], reference["anomaly_map"], strict=True):
        span = np.ptp(other)
        # On a black picture a map can be flat: then there is no correlation, and no range.
        correlations.append(float(np.corrcoef(mine.ravel(), other.ravel())[0, 1]) if span > 0 else 1.0)
        shares.append(float((np.abs(mine - other) <= (1e-3 * span or ROUNDING)).mean()))
    return {
        "score_difference": float(np.abs(scores - expected).max()),
        "score_range": float(np.ptp(expected)),
        "correlations": correlations,
        "equal_pixels": shares,
        "labels_changed": int((ours["pred_label"] != reference["pred_label"]).sum()) if "pred_label" in ours else None,
    }


def rows(model: KdMultiresolution | KdMultiresolutionDual, data: AnomalibDataModule) -> dict[str, dict[str, Any]]:
    """Return torch's figures and those of each kind of file, by its name."""
    labels, masks = [], []
    for batch in data.test_dataloader():
        labels.append(batch.gt_label.int())
        masks.append(batch.gt_mask.as_subclass(Tensor).float()[:, None])
    reference = answers(partial(in_torch, model), data)
    mask = F.interpolate(torch.cat(masks), size=reference["anomaly_map"].shape[-2:], mode="nearest")[:, 0] > 0
    found = {"torch": reference}
    for name, compression in track(FILES.items(), description="export"):
        with tempfile.TemporaryDirectory() as folder:
            file = (
                model.to_onnx(Path(folder))
                if name == "ONNX"
                else model.to_openvino(Path(folder), compression_type=compression, datamodule=data)
            )
            found[name] = answers(next(iter(runtimes(file).values())), data)
    table = {}
    for name, outputs in found.items():
        scores, maps = (torch.from_numpy(outputs[key].copy()) for key in ("pred_score", "anomaly_map"))
        metrics = raw_metrics(Predictions(scores.flatten(), torch.cat(labels), maps, mask))
        table[name] = {**metrics, **compared(outputs, reference)}
    return table


def table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    head = ["file", "image", "pixel", "score, %", "labels", "maps, mean / least", "pixels within 1e-3, % / worst"]
    cells = [
        [
            name,
            f"{100 * row['image_AUROC']:.1f}",
            f"{100 * row['pixel_AUROC']:.1f}",
            f"{100 * row['score_difference'] / row['score_range']:.2g}",
            row["labels_changed"],
            f"{np.mean(row['correlations']):.4f} / {min(row['correlations']):.4f}",
            f"{100 * np.mean(row['equal_pixels']):.2f} / {100 * min(row['equal_pixels']):.2f}",
        ]
        for name, row in found.items()
    ]
    return markdown(head, cells)


def main(arguments: Sequence[str] | None = None) -> None:
    """Export, compare, and write JSON and table."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="of a trained model")
    add("--model", choices=MODELS, default="paper")
    add("--map", default="discrepancy", help="anomaly_map of the paper's model")
    add("--path", default="cloner", help="attribution_path of the paper's model")
    add("--root", type=Path, default=Path("datasets/MVTecAD"), help="folder of MVTec AD")
    add("--category", default="bottle", help="category of MVTec AD")
    add("--output", type=Path, required=True, help="files to write, without suffix")
    options = parser.parse_args(arguments)
    reading = {"anomaly_map": options.map, "attribution_path": options.path} if options.model == "paper" else {}
    model = MODELS[options.model].load_from_checkpoint(options.checkpoint, map_location="cpu", **reading).eval()
    data = MVTecAD(options.root, options.category, train_batch_size=1, eval_batch_size=4, num_workers=0)
    data.setup()
    found = rows(model, data)
    write_both(
        options.output, {"category": options.category, "model": options.model, **reading, "rows": found}, table(found)
    )


if __name__ == "__main__":
    main()
