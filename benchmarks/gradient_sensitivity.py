"""Why gradient maps miss defects that the discrepancy map finds: how much of a gradient says nothing about the error.

python benchmarks/gradient_sensitivity.py --checkpoint model.ckpt --category screw --output screw

A gradient is the error at the critical points, carried back to the pixels. The map called "sensitivity" carries back
random numbers in place of the error, so it shows where the networks answer strongly to whatever happens, and knows
nothing of defects. The sum of discrepancy and gradient takes each in multiples of its mean on normal training images.
Writes ``screw.json`` and ``screw.md``: pixel AUROC x 100 on all pixels and on the object (what
differs from the picture's border), and the mean on background, intact object and defects over the mean of each image.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812
from anomalib.data import MVTecAD
from rich.progress import track
from sklearn.metrics import roc_auc_score
from torch import Tensor

from kd_multiresolution import KdMultiresolution, KdMultiresolutionModel
from kd_multiresolution.anomaly_map import discrepancy_map
from kd_multiresolution.attribution import input_gradient

DRAWS = 3  # of random numbers per image
NORMAL_IMAGES = 32  # of the training set, for the scale of the maps
CONTRAST = 0.08  # of grey values in [0, 1]: what differs more from the border is object
REGIONS = ("background", "object", "defect")


def object_mask(pictures: Tensor) -> Tensor:
    """Return where pictures, (N, 3, H, W) in [0, 1], differ from their border, with a margin: (N, H, W)."""
    grey = pictures.mean(1)
    edges = torch.cat([grey[:, 0], grey[:, -1], grey[:, :, 0], grey[:, :, -1]], 1)
    differs = (grey - edges.median(1).values[:, None, None]).abs() > CONTRAST
    return F.max_pool2d(differs.float()[:, None], 7, stride=1, padding=3)[:, 0] > 0


def random_score(network: KdMultiresolutionModel, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    """Return a score whose gradient at the activations is random, of equal size at each critical point."""

    def score(images: Tensor) -> Tensor:
        source, cloner = network._score_features(images)
        total = images.new_zeros(len(images))
        for s, c in zip(source, cloner, strict=True):
            numbers = torch.randn(s.shape, generator=generator) / s[0].numel() ** 0.5
            total = total + (numbers * (c - s)).sum((1, 2, 3))
        return total

    return score


def maps_of(network: KdMultiresolutionModel, images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Return the maps by name, (N, H, W)."""

    def finished(attribution: Tensor) -> Tensor:
        return cast("Tensor", network.anomaly_map_generator(attribution))[:, 0]

    maps = {}
    for path in ("both", "cloner"):
        network.attribution_path = path
        gradient = finished(input_gradient(network._score, images)[1])
        draws = [input_gradient(random_score(network, generator), images)[1] for _ in range(DRAWS)]
        sensitivity = torch.stack([finished(draw) for draw in draws]).mean(0)
        # A tenth of the mean is added, lest the quotient be large where both are small.
        floor = 0.1 * sensitivity.mean((1, 2), keepdim=True)
        maps[f"gradient, {path}"] = gradient
        maps[f"sensitivity, {path}"] = sensitivity
        maps[f"gradient / sensitivity, {path}"] = gradient / (sensitivity + floor)
    with torch.no_grad():
        height, width = images.shape[-2:]
        features = network._score_features(images)
        weight, terms = network.known_value_weight, network.terms
        local = discrepancy_map(*features, (height, width), value_weight=weight, terms=terms)
        maps["discrepancy"] = finished(local)
    return maps


def add_combinations(maps: dict[str, Tensor], normal: dict[str, Tensor]) -> None:
    """Add product and sum of discrepancy and gradient; the sum's terms are relative to their means on normal images."""
    for path in ("both", "cloner"):
        gradient = f"gradient, {path}"
        maps[f"discrepancy x {gradient}"] = maps["discrepancy"] * maps[gradient]
        terms = [maps[name] / normal[name].mean() for name in ("discrepancy", gradient)]
        maps[f"discrepancy + {gradient}"] = terms[0] + terms[1]


def rows(model: KdMultiresolution, data: MVTecAD) -> list[dict[str, float | str]]:
    """Return one row per map."""
    data.setup()
    network = model.eval().model
    generator = torch.Generator().manual_seed(0)
    assert callable(model.pre_processor)
    first = [data.train_data[index].image for index in range(NORMAL_IMAGES)]
    normal = maps_of(network, model.pre_processor(torch.stack(first)).as_subclass(Tensor), generator)
    found: dict[str, list[Tensor]] = {}
    for batch in track(data.test_dataloader(), description="images"):
        images = model.pre_processor(batch.image).as_subclass(Tensor)
        size = images.shape[-2:]
        masks = F.interpolate(batch.gt_mask.as_subclass(Tensor).float()[:, None], size=size, mode="nearest")[:, 0] > 0
        pictures = F.interpolate(batch.image.as_subclass(Tensor), size=size, mode="bilinear")
        every = {"mask": masks, "object": object_mask(pictures), **maps_of(network, images, generator)}
        for name, tensor in every.items():
            found.setdefault(name, []).append(tensor)
    maps = {name: torch.cat(tensors) for name, tensors in found.items()}
    add_combinations(maps, normal)
    defect, on_object = maps.pop("mask"), maps.pop("object")
    regions = (~on_object & ~defect, on_object & ~defect, defect)
    table: list[dict[str, float | str]] = []
    for name, values in maps.items():
        relative = values / values.mean((1, 2), keepdim=True)
        table.append(
            {
                "map": name,
                "pixel AUROC": roc_auc_score(defect.flatten(), values.flatten()),
                "on the object": roc_auc_score(defect[on_object], values[on_object]),
                **{region: relative[where].mean().item() for region, where in zip(REGIONS, regions, strict=True)},
            }
        )
    return table


def markdown(table: list[dict[str, float | str]]) -> str:
    """Return the rows as a Markdown table."""
    columns = list(table[0])
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for row in table:
        aurocs = [f"{100 * cast('float', row[name]):.1f}" for name in columns[1:3]]
        means = [f"{row[name]:.2f}" for name in REGIONS]
        lines.append("| " + " | ".join([str(row["map"]), *aurocs, *means]) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint of a trained model")
    parser.add_argument("--root", type=Path, default=Path("datasets/MVTecAD"), help="folder of MVTec AD")
    parser.add_argument("--category", default="bottle", help="category of MVTec AD")
    parser.add_argument("--output", type=Path, required=True, help="files to write, without suffix")
    arguments = parser.parse_args()
    model = KdMultiresolution.load_from_checkpoint(arguments.checkpoint)
    table = rows(model, MVTecAD(arguments.root, arguments.category, eval_batch_size=8, num_workers=0))
    settings = {"category": arguments.category, "image_size": model.hparams["image_size"]}
    arguments.output.with_suffix(".json").write_text(json.dumps({**settings, "rows": table}, indent=1))
    arguments.output.with_suffix(".md").write_text(markdown(table))
    print(markdown(table))
