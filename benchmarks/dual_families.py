"""Compare the families of maps of a trained dual model, and rules to join them.

python benchmarks/dual_families.py --checkpoint model.ckpt --category screw --output screw

Writes ``screw.md`` and ``screw.json``, all x 100: AUROC of images, by the mean of the map's highest hundredth, and of
pixels; AUPRO. The rules measure each family in its deviations on the held-out normal images. The last two rows are the
map that images are scored by, and the one that is shown; below stands how many test images are above the threshold that
is told from normal ones.

``screw.png`` shows each of these maps on some defects, from the lowest value on held-out normal images (dark) to the
highest on the defects shown (bright), with the outline of the mask.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from anomalib.data import MVTecAD
from anomalib.pre_processing import PreProcessor
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.transforms.v2 import Transform

from kd_multiresolution import KdMultiresolution
from kd_multiresolution.checkpoint import KEY
from kd_multiresolution.dual import FAMILIES, DualModel, top_mean
from kd_multiresolution.dual_cloners import resized
from kd_multiresolution.post_processor import NormalScores
from kd_multiresolution.raw_metrics import Predictions, raw_metrics

COLUMNS = ("image_AUROC", "pixel_AUROC", "AUPRO")


@torch.inference_mode()
def read(network: DualModel, prepare: PreProcessor, batches: Iterable[Any]) -> dict[str, Tensor]:
    """Return all images with labels, masks, scores, and blurred maps, (N, K, H, W)."""
    pictures, maps, scores, labels, masks = [], [], [], [], []
    for batch in batches:
        # Masks are compared at the size of the model's images, as anomalib does.
        transformed, mask = cast("Transform", prepare.transform)(batch.image, batch.gt_mask)
        images = network.checked_images(transformed)
        features = network.source(images)
        local, overall = network.predictions(features)
        families = network.families(features, local, overall)
        maps.append(network.blurred(families))
        predicted = network.read(families, network.as_a_whole(features, local), (1, 1))
        scores.append(cast("Tensor", predicted.pred_score))
        pictures.append(resized(batch.image.as_subclass(Tensor), tuple(images.shape[-2:])))
        labels.append(batch.gt_label.int())
        masks.append(mask.as_subclass(Tensor).bool())
    parts = {"images": pictures, "maps": maps, "scores": scores, "labels": labels, "masks": masks}
    return {name: torch.cat(part) for name, part in parts.items()}


def joined(network: DualModel, normal: Tensor, maps: Tensor) -> dict[str, Tensor]:
    """Return each reading's maps, (N, 1, H, W), by its name; only the last one has the coarser scales."""
    families = [[i for i, of in enumerate(network.maps[: network.fine]) if of == name] for name in FAMILIES]
    summed, of_normal = (torch.stack([part[:, i].sum(1) for i in families], 1) for part in (maps, normal))
    deviations = top_mean(of_normal)
    standardized = (summed - deviations.mean(0)[:, None, None]) / deviations.std(0)[:, None, None]
    weighted = maps * network.family_weight[:, None, None]
    return {
        **{name: summed[:, [i]] for i, name in enumerate(FAMILIES)},
        "sum of the three": standardized.sum(1, keepdim=True),
        "largest of the three": standardized.amax(1, keepdim=True),
        "by painted defects": weighted[:, : network.fine].sum(1, keepdim=True),
        "with coarser scales": weighted.sum(1, keepdim=True),
    }


def read_all(
    model: KdMultiresolution, held_out: Sequence[str], data: MVTecAD
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what :func:`read` does of the held-out normal images, given by their names, and of the test images.

    Raises:
        ValueError: if the data have others.
    """
    network, prepare = cast("DualModel", model.eval().model), cast("PreProcessor", model.pre_processor)
    data.setup()
    indices = [i for i, path in enumerate(data.train_data.samples.image_path) if Path(path).name in held_out]
    if len(indices) != len(held_out):
        msg = f"{len(held_out)} images were held out of the training, of which {data.category!r} has {len(indices)}."
        raise ValueError(msg)
    data.train_data.subsample(indices, inplace=True)
    return read(network, prepare, data.train_dataloader()), read(network, prepare, data.test_dataloader())


def rows(network: DualModel, normal: dict[str, Tensor], test: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Return one row per reading."""
    size = cast("tuple[int, int]", tuple(test["masks"].shape[-2:]))
    table = []
    for name, maps in joined(network, normal["maps"], test["maps"]).items():
        found = raw_metrics(
            Predictions(top_mean(maps)[:, 0], test["labels"], resized(maps - maps.min(), size), test["masks"])
        )
        table.append({"map": name, **{column: found[column] for column in COLUMNS}})
    return table


def alarms(rate: float, normal: dict[str, Tensor], test: dict[str, Tensor]) -> str:
    """Return how many test images of either kind lie above the threshold that is told from normal images."""
    held_out, scores = normal["scores"], test["scores"]
    threshold = NormalScores(float(held_out.mean()), float(held_out.std()), len(held_out)).bound(rate)
    counts = []
    for label, kind in enumerate(("good", "defective")):
        above = scores[test["labels"] == label] > threshold
        counts.append(f"{int(above.sum())} of {len(above)} {kind}")
    return f"Above the threshold for {rate:g} false alarms: {', '.join(counts)} test images."


def draw(network: DualModel, normal: dict[str, Tensor], test: dict[str, Tensor], count: int, file: Path) -> None:
    """Draw defective test images, evenly spread over their kinds, and their maps in every reading."""
    defective = test["labels"].nonzero()[:, 0]
    chosen = defective[torch.linspace(0, len(defective) - 1, min(count, len(defective))).round().long()]
    maps, floor = (joined(network, normal["maps"], part) for part in (test["maps"][chosen], normal["maps"]))
    columns = len(maps) + 1
    limits = [(0.0, 1.0), *((float(floor[name].amin()), float(found.amax())) for name, found in maps.items())]
    figure = Figure(figsize=(1.6 * columns, 1.7 * len(chosen) + 0.4), layout="constrained")
    for row, axes in enumerate(figure.subplots(len(chosen), columns, squeeze=False)):
        image, mask = test["images"][chosen[row]], test["masks"][chosen[row]].squeeze()
        size = tuple(image.shape[-2:])
        outline = resized(mask[None, None].float(), size)[0, 0]
        pictures = [image.movedim(0, -1), *(resized(found[row][None], size)[0, 0] for found in maps.values())]
        for ax, name, picture, (low, high) in zip(axes, ("image", *maps), pictures, limits, strict=True):
            ax.imshow(picture.numpy(), vmin=low, vmax=high, cmap="inferno")
            ax.contour(outline.numpy(), [0.5], colors="cyan", linewidths=0.6)
            ax.set_axis_off()
            if row == 0:
                ax.set_title(name, fontsize=8)
    FigureCanvasAgg(figure).print_figure(file, dpi=100)


def markdown(table: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| map | " + " | ".join(COLUMNS) + " |", "|---" * (1 + len(COLUMNS)) + "|"]
    lines += [
        "| " + " | ".join([row["map"], *(f"{100 * row[column]:.1f}" for column in COLUMNS)]) + " |" for row in table
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Write table, weights and picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint of a trained dual model")
    parser.add_argument("--root", type=Path, default=Path("datasets/MVTecAD"), help="folder of MVTec AD")
    parser.add_argument("--category", default="bottle", help="category of MVTec AD")
    parser.add_argument("--defects", type=int, default=6, help="to draw, 1 or more")
    parser.add_argument("--output", type=Path, required=True, help="files to write, without suffix")
    options = parser.parse_args(arguments)
    if options.defects < 1:
        parser.error(f"--defects={options.defects}: expected 1 or more.")
    model = KdMultiresolution.load_from_checkpoint(options.checkpoint)
    data = MVTecAD(options.root, options.category, train_batch_size=8, eval_batch_size=8, num_workers=0)
    network = cast("DualModel", model.model)
    held_out = torch.load(options.checkpoint, map_location="cpu", weights_only=True)[KEY]["held_out"]
    normal, test = read_all(model, held_out, data)
    table = rows(network, normal, test)
    draw(network, normal, test, options.defects, options.output.with_suffix(".png"))
    weights = [*zip(network.maps, network.family_weight.tolist(), strict=True)]
    options.output.with_suffix(".json").write_text(json.dumps({"rows": table, "weights": weights}, indent=1))
    text = f"{markdown(table)}\n{alarms(model.false_alarm_rate, normal, test)}\n"
    options.output.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
