"""Compare the anomaly maps of a trained model: method, path and blur, as Table 11 of arXiv 2011.11108 does.

python benchmarks/anomaly_map_methods.py --checkpoint model.ckpt --category screw --output screw

Writes ``screw.json`` and ``screw.md``. Columns, all x 100: pixel AUROC of all test images with binary masks (anomalib's
convention); the paper's, with anomalous images alone, maps scaled by percentile, masks resized bilinearly and left
fractional; AUPRO up to a false positive rate of 0.3.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812
from anomalib.data import MVTecAD
from anomalib.pre_processing import PreProcessor
from rich.progress import track
from torch import Tensor, nn

from kd_multiresolution import AnomalyMapGenerator, KdMultiresolution
from kd_multiresolution.raw_metrics import Predictions, covered_auroc, raw_metrics

SIGMA = 4.0
COLUMNS = ("pixel AUROC", "pixel AUROC, paper's", "AUPRO")
# Method and path; the discrepancy map has no path.
MAPS = (
    ("gradient", "both"),
    ("gradient", "cloner"),
    ("smooth_grad", "both"),
    ("smooth_grad", "cloner"),
    ("guided_backprop", "both"),
    ("guided_backprop", "cloner"),
    ("discrepancy", "-"),
)


def test_images(prepare: PreProcessor, data: MVTecAD) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yield images as the model takes them, (N, 3, H, W), labels, (N,), binary and fractional masks, (N, H, W)."""
    for batch in data.test_dataloader():
        images = prepare(batch.image).as_subclass(Tensor)
        masks = batch.gt_mask.as_subclass(Tensor).float()[:, None]
        size = images.shape[-2:]
        binary = F.interpolate(masks, size=size, mode="nearest") > 0
        coverage = F.interpolate(masks, size=size, mode="bilinear", align_corners=False)
        yield images, batch.gt_label.int(), binary[:, 0], coverage[:, 0]


def rows(model: KdMultiresolution, data: MVTecAD) -> list[dict[str, object]]:
    """Return one row per method, path and blur."""
    data.setup()
    network = model.eval().model
    # Attributions are computed once, and turned into maps below.
    network.anomaly_map_generator = cast("AnomalyMapGenerator", nn.Identity())
    batches = list(test_images(cast("PreProcessor", model.pre_processor), data))
    labels, binary, coverage = (torch.cat([batch[i] for batch in batches]) for i in (1, 2, 3))
    anomalous = labels.bool()
    table: list[dict[str, object]] = []
    for method, path in track(MAPS, description="maps"):
        network.anomaly_map = method
        network.attribution_path = "both" if path == "-" else path
        with torch.inference_mode():
            outputs = [network(images) for images, *_ in batches]
        attributions = torch.cat([output.anomaly_map for output in outputs])
        scores = torch.cat([output.pred_score for output in outputs])
        for sigma in (0.0, SIGMA):
            maps = AnomalyMapGenerator(sigma)(attributions)
            scaled = AnomalyMapGenerator(sigma, percentile_scale=True)(attributions)[:, 0]
            metrics = raw_metrics(Predictions(scores, labels, maps, binary))
            papers = covered_auroc(scaled[anomalous], coverage[anomalous])
            figures = (metrics["pixel_AUROC"], papers, metrics["AUPRO"])
            table.append({"method": method, "path": path, "sigma": sigma, **dict(zip(COLUMNS, figures, strict=True))})
    return table


def markdown(table: list[dict[str, object]]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| map | gradient through | blur | " + " | ".join(COLUMNS) + " |", "|---" * (3 + len(COLUMNS)) + "|"]
    for row in table:
        figures = " | ".join(f"{100 * cast('float', row[column]):.1f}" for column in COLUMNS)
        lines.append(f"| {row['method']} | {row['path']} | {row['sigma']:g} | {figures} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint of a trained model")
    parser.add_argument("--root", type=Path, default=Path("datasets/MVTecAD"), help="folder of MVTec AD")
    parser.add_argument("--category", default="bottle", help="category of MVTec AD")
    parser.add_argument("--samples", type=int, default=50, help="SmoothGrad's number of noisy copies")
    parser.add_argument("--output", type=Path, required=True, help="files to write, without suffix")
    arguments = parser.parse_args()
    model = KdMultiresolution.load_from_checkpoint(arguments.checkpoint)
    model.model.smooth_grad_samples = arguments.samples
    data = MVTecAD(arguments.root, arguments.category, eval_batch_size=8, num_workers=0)
    table = rows(model, data)
    settings = {"category": arguments.category, "samples": arguments.samples, "image_size": model.hparams["image_size"]}
    arguments.output.with_suffix(".json").write_text(json.dumps({**settings, "rows": table}, indent=1))
    arguments.output.with_suffix(".md").write_text(markdown(table))
    print(markdown(table))
