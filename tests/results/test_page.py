"""What the page says of labels, thresholds and heat maps, and that it shows each image once."""

from __future__ import annotations

import pytest
import torch
from anomalib.data import ImageBatch
from matplotlib.figure import Figure

from kd_multiresolution.results.judged import JudgedRun, Scale
from kd_multiresolution.results.page import draw_page
from kd_multiresolution.results.scored import ScoredImages

SIZE = 16


def batch(scores: list[float], truths: list[int], labels: list[bool] | None, first: int = 0) -> ImageBatch:
    maps = torch.rand(len(scores), SIZE, SIZE, generator=torch.Generator().manual_seed(first))
    return ImageBatch(
        image=torch.rand(len(scores), 3, SIZE, SIZE), gt_label=torch.tensor(truths).bool(),
        pred_score=torch.tensor(scores), pred_label=None if labels is None else torch.tensor(labels),
        anomaly_map=maps, pred_mask=maps > 0.5, image_path=[f"line{first + i}/cam/1.png" for i in range(len(scores))],
    )  # fmt: skip


def page(run: JudgedRun, *batches: ImageBatch) -> tuple[Figure, ScoredImages]:
    images = ScoredImages(run.scores.threshold)
    for part in batches:
        images.add(part, run)
    return draw_page(images, run), images


def legend(figure: Figure, number: int = 0) -> list[str]:
    return [text.get_text() for text in figure.axes[number].get_legend().get_texts()]


def headings(figure: Figure) -> list[str]:
    titles = [getattr(part, "_suptitle", None) for part in figure.subfigs]
    return [title.get_text() for title in titles if title is not None]


def captions(figure: Figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes[2:] if axes.get_title()]


INSENSITIVE = JudgedRun(Scale("normalised", 0.7), Scale("normalised", 0.7))
FOUR_DEFECTS = batch([0.1, 0.2, 0.55, 0.6, 0.75, 0.9], [0, 0, 1, 1, 1, 1], [False] * 4 + [True] * 2)


def test_counts_are_of_labels_and_the_line_is_their_threshold() -> None:
    figure, images = page(INSENSITIVE, FOUR_DEFECTS)
    assert legend(figure) == ["2 normal, 0 called defective", "4 defective, 2 called defective", "threshold 0.7"]
    assert legend(figure, 1) == ["as labelled: 0.0% false alarms, 50.0% found"]
    assert images.line == 0.7
    assert captions(figure)[2].endswith("\n0.6, defective, called normal")


def test_nearest_are_those_to_the_threshold_of_the_labels() -> None:
    scores = [i / 20 for i in range(20)]
    _, images = page(INSENSITIVE, batch(scores, [0] * 10 + [1] * 10, [score > 0.7 for score in scores]))
    assert [image.score for image in images.borderline] == pytest.approx([0.65, 0.6, 0.55, 0.5, 0.45, 0.4])


def test_labels_that_no_threshold_gives_are_counted_without_a_line() -> None:
    odd = batch([0.1, 0.9, 0.2, 0.8], [0, 0, 1, 1], [True, False, False, True])
    figure, images = page(INSENSITIVE, odd)
    assert images.line is None
    assert images.borderline == []
    assert legend(figure) == ["2 normal, 1 called defective", "2 defective, 1 called defective"]


def test_a_fitted_threshold_that_labels_do_not_use_is_drawn_as_such() -> None:
    figure, _ = page(JudgedRun(Scale("raw", 0.5, 0.7), Scale("raw", 0.5, 0.7)), batch([0.6, 0.8], [0, 1], [True, True]))
    assert legend(figure)[2:] == ["threshold 0.5", "fitted threshold 0.7, not the labels'"]
    assert figure.axes[0].get_xlabel() == "raw score"
    assert headings(figure)[0].endswith("heat map where it is above the fitted threshold")


@pytest.mark.parametrize(
    ("maps", "said"),
    [
        (Scale("normalised", 0.5), "image, heat map where pixels are marked"),
        (Scale("normalised"), "image, heat map"),
        (Scale("raw"), "image, raw heat map, each with colours of its own range"),
        (Scale("raw", 0.5), "image, heat map where pixels are marked"),
        (Scale("unknown"), "image, heat map where pixels are marked"),  # by a mask that some post-processor gave
    ],
)
def test_headings_say_what_heat_maps_cover(maps: Scale, said: str) -> None:
    figure, _ = page(JudgedRun(Scale("normalised", 0.7), maps), FOUR_DEFECTS)
    assert headings(figure) == [f"most anomalous: {said}"]


def test_masks_and_maps_are_promised_where_there_are_any() -> None:
    scores_alone = FOUR_DEFECTS.update(in_place=False, anomaly_map=None, pred_mask=None)
    assert headings(page(INSENSITIVE, scores_alone)[0]) == ["most anomalous: image"]
    masked = FOUR_DEFECTS.update(in_place=False, gt_mask=torch.zeros(6, SIZE, SIZE))
    assert headings(page(INSENSITIVE, masked)[0]) == [
        "most anomalous: image, true mask, heat map where pixels are marked"
    ]


@pytest.mark.parametrize("count", [1, 5, 6, 7, 9, 30])
def test_no_image_is_shown_twice(count: int) -> None:
    scores = [0.02 * i + 0.3 for i in range(count)]
    labels = [score > 0.7 for score in scores]
    # Two processes, of which the second repeats an image.
    parts = [batch(scores, [i % 2 for i in range(count)], labels), batch(scores[:1], [0], labels[:1])]
    figure, images = page(INSENSITIVE, *parts)
    shown = captions(figure)
    assert len({*shown}) == len(shown) == min(count, 12)
    assert len(images.scores) == count + 1  # as in the metrics


def test_captions_tell_images_of_one_name_apart() -> None:
    run = JudgedRun(Scale("normalised", 0.7), Scale("normalised", 0.7))
    captioned = captions(page(run, FOUR_DEFECTS)[0])
    assert len({caption.split("\n")[0] for caption in captioned}) == 6


@pytest.mark.parametrize("unit", ["raw", "normalised"])
def test_legends_cover_nothing_of_the_plots(unit: str) -> None:
    run = JudgedRun(Scale(unit, 0.5, 0.7 if unit == "raw" else None), Scale(unit, 0.5))
    scores = [0.1 * i for i in range(1, 11)]
    figure, _ = page(run, batch(scores, [0, 1] * 5, [score > 0.5 for score in scores]))
    figure.canvas.draw()
    for axes in figure.axes[:2]:
        box = axes.get_legend().get_window_extent()
        assert not box.overlaps(axes.get_window_extent())
        assert not box.overlaps(figure.axes[2].get_window_extent())
        assert box.x0 >= 0


def test_wide_pictures_stand_one_below_the_other() -> None:
    wide = ImageBatch(
        image=torch.rand(1, 3, 16, 64), gt_label=torch.tensor([True]), pred_score=torch.tensor([0.9]),
        pred_label=torch.tensor([True]), anomaly_map=torch.rand(1, 16, 64), gt_mask=torch.ones(1, 16, 64).bool(),
    )  # fmt: skip
    figure, _ = page(INSENSITIVE, wide)
    height, width = figure.axes[2].images[0].get_array().shape[:2]
    assert width / height == pytest.approx(4 / 3, rel=0.05)
