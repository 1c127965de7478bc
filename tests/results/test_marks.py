from __future__ import annotations

import re

import pytest
import torch

from kd_multiresolution.results.marks import MOST_BOXES, OUTLINE_LENGTH, Marked, outline
from kd_multiresolution.results.view import Box, Frame


def marks() -> torch.Tensor:
    """Two regions of 8 x 16: one of 2 x 3, and a larger one of 4 x 4 that touches it at no corner."""
    found = torch.zeros(8, 16).bool()
    found[1:3, 2:5] = True
    found[4:8, 12:16] = True
    return found


def test_boxes_are_those_of_the_file() -> None:
    frame = Frame(torch.zeros(3, 8, 16), torch.zeros(3, 100, 400), Box(100, 10, 260, 90))
    found = Marked.of(marks(), frame)
    assert (found.width, found.height, found.of_file) == (400, 100, True)
    assert found.boxes == ((220, 50, 260, 90), (120, 20, 150, 40))  # ten pixels each
    assert found.area == 100 * (16 + 6)
    assert found.regions == 2


def test_boxes_are_those_of_what_the_model_saw_where_the_file_is_not_known() -> None:
    found = Marked.of(marks(), Frame(torch.zeros(3, 8, 16)))
    assert (found.width, found.height, found.of_file) == (16, 8, False)
    assert found.boxes == ((12, 4, 16, 8), (2, 1, 5, 3))


def test_padding_is_not_of_the_file() -> None:
    frame = Frame(torch.zeros(3, 8, 16), torch.zeros(3, 8, 12), Box(-2, 0, 14, 8))
    assert Marked.of(marks(), frame).boxes[0] == (10, 4, 12, 8)


def test_corners_join_and_nothing_has_no_box() -> None:
    diagonal = torch.eye(8).bool()
    frame = Frame(torch.zeros(3, 8, 8))
    assert Marked.of(diagonal, frame).boxes == ((0, 0, 8, 8),)
    nothing = Marked.of(torch.zeros(8, 8), frame)
    assert (nothing.area, nothing.boxes, nothing.regions) == (0, (), 0)


def test_what_lies_on_the_border_is_not_marked() -> None:
    values = torch.full((8, 8), 0.5)
    values[2, 3] = 0.6
    assert Marked.of(values, Frame(torch.zeros(3, 8, 8))).boxes == ((3, 2, 4, 3),)
    assert outline(torch.full((8, 8), 0.5)) == ""


def test_noise_has_an_end() -> None:
    noise = torch.rand(256, 256, generator=torch.Generator().manual_seed(0)) > 0.9
    found = Marked.of(noise, Frame(torch.zeros(3, 256, 256)))
    assert len(found.boxes) == MOST_BOXES < found.regions
    assert len(outline(noise)) <= OUTLINE_LENGTH


def test_an_outline_encloses_what_is_marked() -> None:
    large = torch.zeros(200, 400)
    large[50:150, 100:300] = 1
    points = [tuple(map(int, point.split())) for point in re.findall(r"\d+ \d+", outline(large))]
    xs, ys = zip(*points, strict=True)
    assert (min(xs), max(xs), min(ys), max(ys)) == pytest.approx((250, 750, 250, 750), abs=12)


def test_a_speck_and_the_rim_have_an_outline() -> None:
    speck = torch.zeros(500, 500)
    speck[250, 250] = 1
    assert outline(speck)
    assert outline(torch.ones(10, 10)).startswith("M")
