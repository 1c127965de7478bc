"""The page about a test run: a histogram, the ROC curve, and the pictures to look at first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from textwrap import wrap
from typing import Any, cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from sklearn.metrics import roc_auc_score, roc_curve

from kd_multiresolution.results.drawing import heat_map, mask, together
from kd_multiresolution.results.judged import JudgedImage, JudgedRun
from kd_multiresolution.results.scored import ScoredImages

WIDTH, PLOTS_HEIGHT, HEADING, LINE = 12.0, 4.4, 0.45, 0.2  # inches
COLUMNS = 3
PICTURE_SIZE = (256, 256)
WIDE = 1.5  # proportions from which on pictures stand one below the other
CAPTION = 52  # characters in a line
KINDS = ("normal", "defective")
COLOURS = ("tab:green", "tab:red")


def draw_page(images: ScoredImages, run: JudgedRun) -> Figure:
    """Return the page.

    Args:
        images: predictions of at least one image.
        run: what they have in common.
    """
    shown = {"most anomalous": images.most_anomalous, "nearest to the threshold": images.borderline}
    rows = {title: [(image, _tile(image, run)) for image in some] for title, some in shown.items() if some}
    heights = [PLOTS_HEIGHT, *map(_height, rows.values())]
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    plots, *parts = np.atleast_1d(cast("Any", figure.subfigures(len(heights), 1, height_ratios=heights)))
    histogram, curve = plots.subplots(1, 2)
    _draw_histogram(histogram, images, run)
    _draw_roc(curve, images)
    for part, (title, tiles) in zip(parts, rows.items(), strict=True):
        part.suptitle(f"{title}: {_content([image for image, _ in tiles], run)}")
        cells = part.subplots(math.ceil(len(tiles) / COLUMNS), COLUMNS, squeeze=False).flat
        for axes, (image, tile) in zip(cells, tiles, strict=False):
            axes.imshow(tile)
            axes.set_title(_caption(image), fontsize="small")
        for axes in part.axes:
            axes.set_axis_off()
    return figure


def _draw_histogram(axes: Axes, images: ScoredImages, run: JudgedRun) -> None:
    scores, truths, labels = (np.asarray(values) for values in (images.scores, images.truths, images.labels))
    unit = "" if run.scores.unit == "unknown" else f"{run.scores.unit} "
    axes.set(title=f"{len(scores)} test images", xlabel=f"{unit}score", ylabel="images")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    bins = np.histogram_bin_edges(scores, bins=30)
    for truth, (kind, colour) in enumerate(zip(KINDS, COLOURS, strict=True)):
        of_kind = truths == truth
        if not of_kind.any():
            continue
        called = f", {int(labels[of_kind].sum())} called defective" if len(labels) else ""
        label = f"{int(of_kind.sum())} {kind}{called}"
        axes.hist(scores[of_kind], bins.tolist(), alpha=0.6, color=colour, label=label)
    if images.line is not None:
        axes.axvline(images.line, color="black", linestyle="--", label=f"threshold {images.line:.4g}")
    if (fitted := run.scores.fitted) is not None:
        label = f"fitted threshold {fitted:.4g}, not the labels'"
        axes.axvline(fitted, color="grey", linestyle=":", label=label)
    _put_legend(axes)


def _draw_roc(axes: Axes, images: ScoredImages) -> None:
    scores, truths, labels = (np.asarray(values) for values in (images.scores, images.truths, images.labels))
    axes.set(xlabel="share of normal images called defective", ylabel="share of defective ones")
    if len({*images.truths}) < len(KINDS):
        axes.set_title("no ROC curve: the test set has one kind of images")
        axes.set_axis_off()
        return
    false_alarms, found, _ = roc_curve(truths, scores, drop_intermediate=False)
    axes.set_title(f"ROC curve, AUROC {roc_auc_score(truths, scores):.4f}")
    axes.plot(false_alarms, found)
    axes.plot([0, 1], [0, 1], color="lightgrey", zorder=0)
    if len(labels):
        at = [float(labels[truths == truth].mean()) for truth in range(len(KINDS))]
        axes.plot(*at, "o", color="black", label=f"as labelled: {at[0]:.1%} false alarms, {at[1]:.1%} found")
        _put_legend(axes)


def _put_legend(axes: Axes) -> None:
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), fontsize="small", ncols=2, frameon=False)


def _tile(image: JudgedImage, run: JudgedRun) -> Image.Image:
    """Return the pictures of an image side by side, or one below the other if they are wide."""
    picture = run.view.picture(image.image, image.path, PICTURE_SIZE)
    pictures = [picture]
    if image.true_mask is not None:
        pictures.append(mask(image.true_mask, picture))
    if (scores := image.anomaly_map) is not None:
        pictures.append(heat_map(picture, run.maps.colours(scores), run.maps.marked(scores, image.predicted_mask)))
    return together(pictures, below=picture.width > WIDE * picture.height)


def _content(images: Sequence[JudgedImage], run: JudgedRun) -> str:
    """Say what the pictures of images show."""
    parts = ["image"]
    if any(image.true_mask is not None for image in images):
        parts.append("true mask")
    maps = [(scores, image.predicted_mask) for image in images if (scores := image.anomaly_map) is not None]
    if any(run.maps.has_own_range(scores) for scores, _ in maps):
        parts.append("raw heat map, each with colours of its own range")
    elif any(run.maps.marked(scores, marks) is None for scores, marks in maps):
        parts.append("heat map")
    elif maps:
        where = "pixels are marked" if run.maps.fitted is None else "it is above the fitted threshold"
        parts.append(f"heat map where {where}")
    return ", ".join(parts)


def _caption(image: JudgedImage) -> str:
    """Return the name of an image, its score, what it is, and what it was called."""
    said = [f"{image.score:.3g}"]
    if image.truth is not None:
        said.append(KINDS[image.truth])
    if image.label is not None:
        said.append(f"called {KINDS[image.label]}")
    return "\n".join([*wrap(image.name, CAPTION), ", ".join(said)])


def _height(tiles: Sequence[tuple[JudgedImage, Image.Image]]) -> float:
    """Return how many inches pictures take, with their captions and the heading."""
    width = WIDTH / COLUMNS
    highest = max(min(width, width * tile.height / tile.width) for _, tile in tiles)
    lines = max(_caption(image).count("\n") + 1 for image, _ in tiles)
    return HEADING + math.ceil(len(tiles) / COLUMNS) * (highest + LINE * lines)
