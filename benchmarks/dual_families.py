"""Compare the families of maps of a trained dual model, and rules to join them.

python benchmarks/dual_families.py --checkpoint model.ckpt --category screw --output screw

Writes ``screw.md`` and ``screw.json``, all x 100: AUROC of images, by the mean of the map's highest hundredth, and of
pixels; AUPRO.
The rules measure each family in its deviations on the held-out normal images; the last row is the model as it is.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from anomalib.data import MVTecAD
from anomalib.pre_processing import PreProcessor
from torch import Tensor

from kd_multiresolution import KdMultiresolution
from kd_multiresolution.dual import FAMILIES, DualModel, top_mean
from kd_multiresolution.dual_cloners import resized
from kd_multiresolution.dual_training import held_out_images
from kd_multiresolution.raw_metrics import Predictions, raw_metrics

COLUMNS = ("image_AUROC", "pixel_AUROC", "AUPRO")


@torch.inference_mode()
def read(network: DualModel, prepare: PreProcessor, batches: Iterable[Any]) -> dict[str, Tensor]:
    """Return the blurred maps of all images, (N, 3 L, H, W), with labels and masks."""
    maps, labels, masks = [], [], []
    for batch in batches:
        images = network.checked_images(prepare(batch.image))
        features = network.source(images)
        maps.append(network.blurred(network.families(features, *network.predictions(features))))
        labels.append(batch.gt_label.int())
        masks.append(batch.gt_mask.as_subclass(Tensor).bool())
    return {"maps": torch.cat(maps), "labels": torch.cat(labels), "masks": torch.cat(masks)}


def joined(network: DualModel, normal: Tensor, maps: Tensor) -> dict[str, Tensor]:
    """Return each reading's maps, (N, 1, H, W), by its name."""
    levels = torch.unflatten(maps, 1, (-1, len(FAMILIES))).sum(1)
    deviations = top_mean(torch.unflatten(normal, 1, (-1, len(FAMILIES))).sum(1))
    standardized = (levels - deviations.mean(0)[:, None, None]) / deviations.std(0)[:, None, None]
    return {
        **{name: levels[:, [i]] for i, name in enumerate(FAMILIES)},
        "sum of the three": standardized.sum(1, keepdim=True),
        "largest of the three": standardized.amax(1, keepdim=True),
        "by painted defects": (maps * network.family_weight[:, None, None]).sum(1, keepdim=True),
    }


def rows(model: KdMultiresolution, data: MVTecAD) -> list[dict[str, Any]]:
    """Return one row per reading."""
    network, prepare = cast("DualModel", model.eval().model), cast("PreProcessor", model.pre_processor)
    data.setup()
    held_out = held_out_images(data.train_data.samples.image_path, model.seed)
    indices = [i for i, path in enumerate(data.train_data.samples.image_path) if path in held_out]
    data.train_data.subsample(indices, inplace=True)
    normal, test = (read(network, prepare, batches) for batches in (data.train_dataloader(), data.test_dataloader()))
    size = cast("tuple[int, int]", tuple(test["masks"].shape[-2:]))
    table = []
    for name, maps in joined(network, normal["maps"], test["maps"]).items():
        found = raw_metrics(
            Predictions(top_mean(maps)[:, 0], test["labels"], resized(maps - maps.min(), size), test["masks"])
        )
        table.append({"map": name, **{column: found[column] for column in COLUMNS}})
    return table


def markdown(table: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| map | " + " | ".join(COLUMNS) + " |", "|---" * (1 + len(COLUMNS)) + "|"]
    lines += [
        "| " + " | ".join([row["map"], *(f"{100 * row[column]:.1f}" for column in COLUMNS)]) + " |" for row in table
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint of a trained dual model")
    parser.add_argument("--root", type=Path, default=Path("datasets/MVTecAD"), help="folder of MVTec AD")
    parser.add_argument("--category", default="bottle", help="category of MVTec AD")
    parser.add_argument("--output", type=Path, required=True, help="files to write, without suffix")
    arguments = parser.parse_args()
    model = KdMultiresolution.load_from_checkpoint(arguments.checkpoint)
    # Masks are compared at the size of the model's images.
    data = MVTecAD(arguments.root, arguments.category, train_batch_size=8, eval_batch_size=8, num_workers=0)
    table = rows(model, data)
    weights = torch.unflatten(cast("DualModel", model.model).family_weight, 0, (-1, len(FAMILIES))).tolist()
    arguments.output.with_suffix(".json").write_text(json.dumps({"rows": table, "weights": weights}, indent=1))
    arguments.output.with_suffix(".md").write_text(markdown(table))
    print(markdown(table))
