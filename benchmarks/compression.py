"""Measure what compressing an exported model does to scores and maps: OpenVINO's float32 against anomalib's types.

python benchmarks/compression.py --checkpoint model.ckpt --category bottle --map discrepancy --output compression

Writes ``compression.json`` and ``compression.md``: AUROC x 100 of images and pixels over all test images, the mean
correlation of each map with that of the model in float32, the largest change of a score in percent of the range of
float32's, and how many labels change; their threshold stays that of float32. INT8_PTQ is calibrated on training images.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from anomalib.data import MVTecAD
from anomalib.deploy import CompressionType
from rich.progress import track
from torch import Tensor

from kd_multiresolution import KdMultiresolution
from kd_multiresolution.raw_metrics import Predictions, raw_metrics
from run_exported import load

TYPES = (None, CompressionType.FP16, CompressionType.INT8, CompressionType.INT8_PTQ)


def predictions(file: Path, data: MVTecAD) -> tuple[Predictions, Tensor]:
    """Return scores and maps of all test images with their labels and masks, and which the model calls anomalous."""
    run, _ = load(file)
    scores, maps, labels, masks, called = [], [], [], [], []
    for batch in data.test_dataloader():
        outputs = run(np.ascontiguousarray(batch.image.as_subclass(Tensor)))
        scores.append(torch.from_numpy(outputs["pred_score"].copy()).flatten())
        maps.append(torch.from_numpy(outputs["anomaly_map"].copy()))
        called.append(torch.from_numpy(outputs["pred_label"].copy()).flatten())
        labels.append(batch.gt_label.int())
        mask = batch.gt_mask.as_subclass(Tensor).float()[:, None]
        masks.append(F.interpolate(mask, size=maps[-1].shape[-2:], mode="nearest")[:, 0] > 0)
    return Predictions(*(torch.cat(parts) for parts in (scores, labels, maps, masks))), torch.cat(called)


def correlation(ours: Tensor, reference: Tensor) -> float:
    """Return the mean correlation of two stacks of maps."""
    pairs = zip(ours.flatten(1), reference.flatten(1), strict=True)
    return float(np.mean([torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs]))


def rows(model: KdMultiresolution, data: MVTecAD) -> list[dict[str, Any]]:
    """Return one row per type of compression."""
    table: list[dict[str, Any]] = []
    reference: tuple[Predictions, Tensor] | None = None
    for compression in track(TYPES, description="compression"):
        with tempfile.TemporaryDirectory() as folder:
            file = model.to_openvino(Path(folder), compression_type=compression, datamodule=data)
            found, called = predictions(file, data)
        reference = reference or (found, called)
        exact, exactly_called = reference
        table.append(
            {
                "type": compression.value if compression else "none",
                **raw_metrics(found),
                "correlation": correlation(cast("Tensor", found.maps), cast("Tensor", exact.maps)),
                "score_change": float((found.scores - exact.scores).abs().max() / np.ptp(exact.scores.numpy())),
                "labels_changed": int((called != exactly_called).sum()),
                "images": len(called),
            }
        )
    return table


def markdown(table: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    titles = (
        "`compression_type`",
        "image AUROC",
        "pixel AUROC",
        "map correlation",
        "score change, %",
        "labels changed",
    )
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in table:
        image, pixel = 100 * row["image_AUROC"], 100 * row["pixel_AUROC"]
        changes = f"{100 * row['score_change']:.2f} | {row['labels_changed']} of {row['images']}"
        lines.append(f"| {row['type']} | {image:.1f} | {pixel:.1f} | {row['correlation']:.3f} | {changes} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint of a trained model")
    parser.add_argument("--root", type=Path, default=Path("datasets/MVTecAD"), help="folder of MVTec AD")
    parser.add_argument("--category", default="bottle", help="category of MVTec AD")
    parser.add_argument("--map", default="discrepancy", help="anomaly_map")
    parser.add_argument("--path", default="cloner", help="attribution_path")
    parser.add_argument("--output", type=Path, required=True, help="files to write, without suffix")
    arguments = parser.parse_args()
    model = KdMultiresolution.load_from_checkpoint(
        arguments.checkpoint, anomaly_map=arguments.map, attribution_path=arguments.path
    ).eval()
    if getattr(model, "post_processor", None) is None:
        parser.error(f"--checkpoint {arguments.checkpoint}: trained without a post-processor, it has no threshold.")
    data = MVTecAD(arguments.root, arguments.category, train_batch_size=1, eval_batch_size=4, num_workers=0)
    data.setup()
    table = rows(model, data)
    settings = {"category": arguments.category, "map": arguments.map, "path": arguments.path}
    arguments.output.with_suffix(".json").write_text(json.dumps({**settings, "rows": table}, indent=1))
    arguments.output.with_suffix(".md").write_text(markdown(table))
    print(markdown(table))
