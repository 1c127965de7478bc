"""What the page says of labels, thresholds and pictures, and that it is whole without a network."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from kd_multiresolution.results.decision import Decision
from kd_multiresolution.results.judged import JudgedRun, Scale
from kd_multiresolution.results.page import ROOM
from tests.results.generated import MIXED, RAW, RUN, SIZE, batch, data_of, notes_of, page, scored

NASTY = "</script><img src=x onerror=alert(1)>&\"'.png"


def test_a_page_knows_its_images_with_raw_scores() -> None:
    data = data_of(page(scored(RUN, *MIXED)))
    assert [image["raw"] for image in data["images"]] == pytest.approx([1, 5.2, 2, 9, 4, 7, 6, 8])
    assert [image["truth"] for image in data["images"]] == [False] * 3 + [True] * 5
    assert data["threshold"] == 5
    assert data["axis"] == {"middle": 5, "span": 10}
    assert data["roc"]["area"] == 0.9333
    assert data["roc"]["points"][0] == [0, 0]
    assert data["roc"]["points"][-1] == [1, 1]
    assert all(image["picture"] and image["heat"] and image["outline"] for image in data["images"])


def test_a_page_asks_for_nothing_from_elsewhere() -> None:
    html = page(scored(RUN, *MIXED))
    # The name of SVG's elements is no address that is asked for.
    assert not re.findall(
        r"""(?:https?:)?//(?!www\.w3\.org/2000/svg)[\w.-]+\.\w+/|<link|src=["'](?!data:)|url\(""", html
    )
    assert "default-src 'none'" in html


def test_names_of_files_cannot_break_out() -> None:
    html = page(scored(RUN, batch([0.1, 0.9], [0, 1], [f"a/{NASTY}", "b/\udc80.png"])))
    assert "<img src=x" not in html
    assert html.count("</script>") == 2
    assert data_of(html)["images"][0]["path"] == f"a/{NASTY}"
    html.encode("utf-8")  # a name that is no UTF-8 does not spoil the file


@pytest.mark.parametrize(
    ("truths", "said"),
    [
        ([0, 0], "There are no defective images among them"),
        ([1, 1], "There are no good images among them"),
        (None, "Nobody says which images are good"),
    ],
)
def test_one_kind_of_images_is_said_to_have_no_curve(truths: list[int] | None, said: str) -> None:
    html = page(scored(RUN, batch([0.1, 0.6], truths)))
    assert said in notes_of(html)
    assert data_of(html)["roc"] is None


def test_what_is_not_there_is_not_shown() -> None:
    plain = batch([0.1, 0.9], [0, 1], anomaly_map=None, pred_mask=None)
    html = page(scored(RUN, plain))
    assert [(image["heat"], image["mask"], image["outline"]) for image in data_of(html)["images"]] == [
        ("", None, None)
    ] * 2
    assert "No pixels were marked" in notes_of(html)


def test_true_masks_are_shown() -> None:
    masks = torch.zeros(2, SIZE, SIZE)
    masks[1, 8:16, 8:24] = 1
    good, defective = data_of(page(scored(RUN, batch([0.1, 0.9], [0, 1], gt_mask=masks))))["images"]
    assert good["mask"] == ""
    xs, ys = (sorted({int(point.split()[i]) for point in re.findall(r"\d+ \d+", defective["mask"])}) for i in (0, 1))
    assert (xs[0], xs[-1], ys[0], ys[-1]) == pytest.approx((250, 750, 250, 500), abs=2)


@pytest.mark.parametrize(
    ("run", "decision", "said"),
    [
        (RUN, Decision(5.0, 5.0, 10.0, "Told from held-out images", True), "images. Figures at this thr"),
        (RUN, Decision(5.0, 5.0, 10.0, "Told from fresh images"), "Told from fresh images."),
        (RUN, Decision(7.5, 5.0, 10.0), "were not labelled by this threshold"),
        (RAW, Decision(), "No threshold is known"),
        (RAW, Decision(), "each has colours of its own range"),
        (JudgedRun(Scale("raw", 0.5, 0.7)), Decision(5.0), "fitted is 0.7; labels were given by 0.5."),
    ],
)  # fmt: skip
def test_notes_say_what_the_figures_rest_on(run: JudgedRun, decision: Decision, said: str) -> None:
    assert said in notes_of(page(scored(run, *MIXED), run, decision))


@pytest.mark.parametrize("decision", [Decision(5.0, 5.0, 10.0, "Told from fresh images"), Decision(5.2, 5.0, 10.0)])
def test_notes_leave_out_what_is_not_so(decision: Decision) -> None:
    notes = notes_of(page(scored(RUN, *MIXED), RUN, decision))
    assert "optimistic" not in notes
    assert "not labelled" not in notes
    assert "No threshold" not in notes


def test_images_stay_below_their_part_of_fifteen_megabytes() -> None:
    noise = torch.rand(20, 3, 64, 64, generator=torch.Generator().manual_seed(0))  # nothing is harder to compress
    fields: dict[str, Any] = {"image": noise, "anomaly_map": noise[:, 0], "pred_mask": noise[:, 0] > 0.5}
    names = [[f"a/{part}_{i}.png" for i in range(20)] for part in range(2)]
    parts = [batch([0.01 * i for i in range(20)], [0] * 20, some, **fields) for some in names]
    html = page(scored(RUN, *parts, room=ROOM // 25, expected=40))
    assert 0.3e6 < len(html) < 0.6e6
    shown = data_of(html)["images"]
    assert len(shown) == 40
    assert all(image["picture"] for image in shown)
    width = max(image["width"] for image in shown)
    assert f"up to {width} x {width} pixels" in notes_of(html)
