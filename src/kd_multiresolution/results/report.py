"""One page about a test run: where the scores lie, what the threshold makes of them, which pictures to look at."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from anomalib.data import ImageBatch, ImageItem
from anomalib.visualization.image.item_visualizer import visualize_image_item
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

from kd_multiresolution.results.visualizer import ThresholdVisualizer

logger = logging.getLogger(__name__)

REPORT_FILE = "report.png"
THRESHOLD = 0.5  # of normalised scores, as anomalib has it
PICTURES = 6  # of either kind
COLUMNS = 3
KINDS = ("normal", "defective")
COLOURS = ("tab:green", "tab:red")


@dataclass
class Picture:
    """An image of the page; only what is drawn of it is kept.

    Attributes:
        score: normalised where there is a threshold.
        name: folder and file.
        item: image and its file, mask and map, on the host.
    """

    score: float
    name: str
    item: ImageItem

    @classmethod
    def of(cls, batch: ImageBatch, index: int) -> Picture:
        """Return the picture of one image of a batch."""
        path = Path(batch.image_path[index] if batch.image_path else "")
        # Normalised for the source, perhaps.
        image = cast("Tensor", batch.image)[index].as_subclass(Tensor).float().cpu()
        image = (image - image.min()) / (image.max() - image.min()).clamp_min(1e-6)
        fields = {name: getattr(batch, name) for name in ("anomaly_map", "gt_mask")}
        present = {name: field[index].cpu() for name, field in fields.items() if field is not None}
        # A data set in memory has names, not files.
        item = ImageItem(image=image, image_path=str(path) if path.is_file() else None, **present)
        return cls(float(cast("Tensor", batch.pred_score)[index]), f"{path.parent.name}/{path.name}", item)


@dataclass
class ScoredImages:
    """What the page shows of a test run.

    Attributes:
        scores: of all images, normalised where there is a threshold, (N,).
        labels: 0 for normal images, 1 for defective ones, (N,).
        most_anomalous: the images with the highest scores, the highest first.
        borderline: those nearest to the threshold, the nearest first.
    """

    scores: list[float] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    most_anomalous: list[Picture] = field(default_factory=list)
    borderline: list[Picture] = field(default_factory=list)

    def add(self, batch: ImageBatch) -> None:
        """Add the predictions of a batch, and keep those of its pictures that belong on the page."""
        scores = cast("Tensor", batch.pred_score).detach().float().flatten().tolist()
        first = sorted(range(len(scores)), key=lambda i: -scores[i])[:PICTURES]
        nearest = sorted(range(len(scores)), key=lambda i: abs(scores[i] - THRESHOLD))[:PICTURES]
        pictures = {i: Picture.of(batch, i) for i in {*first, *nearest}}
        labels = cast("Tensor", batch.gt_label).int().flatten().tolist()
        self.merge(ScoredImages(scores, labels, [pictures[i] for i in first], [pictures[i] for i in nearest]))

    def merge(self, other: ScoredImages) -> None:
        """Add other predictions, such as another process's."""
        self.scores += other.scores
        self.labels += other.labels
        highest = sorted(self.most_anomalous + other.most_anomalous, key=lambda picture: -picture.score)
        nearest = sorted(self.borderline + other.borderline, key=lambda picture: abs(picture.score - THRESHOLD))
        self.most_anomalous, self.borderline = highest[:PICTURES], nearest[:PICTURES]


class Report(Callback):
    """Writes one page about every test run, ``report.png``, into the run's folder.

    A histogram of the scores of normal and defective images with the threshold, the ROC curve where the test set has
    both kinds, and image, true mask and heat map of the most anomalous images and of those nearest to the threshold.
    Heat maps leave out what lies below the threshold of pixels, and show all where there is none. Without a fitted
    threshold of images, scores are raw, nothing is nearest to it, and there are no heat maps.
    """

    def __init__(self) -> None:
        self.run = ScoredImages()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier run."""
        del trainer, pl_module
        self.run = ScoredImages()

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: ImageBatch, *args: Any, **kwargs: Any
    ) -> None:
        """Take in the scores of a batch."""
        del trainer, pl_module, outputs, args, kwargs
        self.run.add(batch)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the page; of several processes the first one does.

        Lightning gives each process equally many images, and repeats one for that; it is then counted twice, as in the
        metrics.
        """
        run = self.run
        if trainer.world_size > 1:
            parts: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, run)
            run = ScoredImages()
            for part in parts:
                run.merge(part)
        self.run = ScoredImages()
        if trainer.is_global_zero and run.scores:
            post_processor = getattr(pl_module, "post_processor", None)
            of_images, of_pixels = (
                bool(torch.isfinite(getattr(post_processor, name, torch.tensor(torch.nan))))
                for name in ("image_threshold", "pixel_threshold")
            )
            visualizer = ThresholdVisualizer(omit_below=THRESHOLD if of_pixels else 0.0)
            page = draw_page(run, visualizer, has_threshold=of_images)
            folder = Path(trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            page.savefig(folder / REPORT_FILE)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Say where the page and the pictures are."""
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir)
        if stage == "test":
            logger.info("Report: %s", folder / REPORT_FILE)
        model = cast("Any", pl_module)
        pictures = model.visualizer.output_dir or folder / "images"
        if stage in {"test", "predict"} and Path(pictures).is_dir():
            logger.info("Heat maps: %s (source: %s)", pictures, model.model.source)


def draw_page(run: ScoredImages, visualizer: ThresholdVisualizer, *, has_threshold: bool) -> Figure:
    """Return the page.

    Args:
        run: predictions of at least one image.
        visualizer: draws the pictures.
        has_threshold: whether scores are normalised; without a threshold nothing is borderline.
    """
    shown = [("most anomalous", run.most_anomalous)]
    if has_threshold:
        shown.append(("nearest to the threshold", run.borderline))
    heights = [4.0, *([3.8] * len(shown))]  # inches
    figure = Figure(figsize=(12, sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    plots, *rows = cast("NDArray[Any]", figure.subfigures(len(heights), 1, height_ratios=heights))
    scores, labels = np.asarray(run.scores), np.asarray(run.labels)
    histogram, curve = plots.subplots(1, 2)
    _draw_histogram(histogram, scores, labels, has_threshold=has_threshold)
    _draw_roc(curve, scores, labels, has_threshold=has_threshold)
    for row, (title, pictures) in zip(rows, shown, strict=True):
        row.suptitle(f"{title}: image, true mask where there is one, heat map where it is high enough")
        for axes, picture in zip(row.subplots(PICTURES // COLUMNS, COLUMNS).flat, pictures, strict=False):
            drawn = visualizer.draw(picture.item) if has_threshold and picture.item.anomaly_map is not None else None
            axes.imshow(drawn or visualize_image_item(picture.item, fields=["image"], text_config={"enable": False}))
            axes.set_title(f"{picture.name}, {picture.score:.2f}", fontsize="small")
        for axes in row.axes:
            axes.set_axis_off()
    return figure


def _draw_histogram(axes: Axes, scores: NDArray[Any], labels: NDArray[Any], *, has_threshold: bool) -> None:
    axes.set(title=f"{len(scores)} test images", xlabel="normalised score" if has_threshold else "raw score")
    axes.set_ylabel("images")
    bins = np.histogram_bin_edges(scores, bins=30)
    for label, (kind, colour) in enumerate(zip(KINDS, COLOURS, strict=True)):
        some = scores[labels == label]
        above = f", {int((some > THRESHOLD).sum())} above the threshold" if has_threshold else ""
        axes.hist(some, bins.tolist(), alpha=0.6, color=colour, label=f"{len(some)} {kind}{above}")
    if has_threshold:
        axes.axvline(THRESHOLD, color="black", linestyle="--", label="threshold")
    axes.legend(fontsize="small")


def _draw_roc(axes: Axes, scores: NDArray[Any], labels: NDArray[Any], *, has_threshold: bool) -> None:
    axes.set(xlabel="share of normal images above the threshold", ylabel="share of defective ones")
    if len({*labels.tolist()}) < len(KINDS):
        axes.set_title("no ROC curve: the test set has one kind of images")
        axes.set_axis_off()
        return
    false_alarms, found, _ = roc_curve(labels, scores, drop_intermediate=False)
    axes.set_title(f"ROC curve, AUROC {roc_auc_score(labels, scores):.4f}")
    axes.plot(false_alarms, found)
    axes.plot([0, 1], [0, 1], color="lightgrey", zorder=0)
    if has_threshold:
        at = [float((scores[labels == label] > THRESHOLD).mean()) for label in range(len(KINDS))]
        axes.plot(*at, "o", color="black", label=f"threshold: {at[0]:.1%} false alarms, {at[1]:.1%} found")
        axes.legend(loc="lower right", fontsize="small")
