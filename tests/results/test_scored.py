from __future__ import annotations

import csv
from pathlib import Path

import pytest

from kd_multiresolution.results.judged import Scale
from kd_multiresolution.results.marks import Marked
from kd_multiresolution.results.scored import ScoredImage, ScoredImages, told_apart_at
from kd_multiresolution.results.scores_file import stage_of, write_scores
from kd_multiresolution.results.tiles import OTHERS
from tests.results.generated import MIXED, RAW, RUN, batch, scored


def test_images_keep_their_order_and_raw_scores() -> None:
    images = scored(RUN, *MIXED)
    assert [image.raw for image in images.images] == pytest.approx([1, 5.2, 2, 9, 4, 7, 6, 8])
    assert [image.label for image in images.images] == [False, True, False, True, False, True, True, True]
    assert len(images.tiles) == 8


def test_without_a_page_there_are_no_pictures() -> None:
    images = scored(RUN, *MIXED, room=0)
    assert images.tiles == []
    assert images.images == scored(RUN, *MIXED).images


def test_processes_together_have_what_one_has() -> None:
    joined = ScoredImages(10**6)
    # The second repeats an image, so that it has as many.
    for part in (scored(RUN, MIXED[0]), scored(RUN, MIXED[1], batch([0.1], [0]))):
        joined.merge(part)
    assert joined.images == scored(RUN, *MIXED).images
    assert [tile.picture for tile in joined.tiles] == [tile.picture for tile in scored(RUN, *MIXED).tiles]


@pytest.mark.parametrize("expected", [None, 8])
def test_pictures_keep_to_their_room(expected: int | None) -> None:
    everything = scored(RUN, *MIXED)
    whole = sum(tile.length for tile in everything.tiles)
    words = sum(OTHERS + len(image.path) + len(image.name) for image in everything.images)
    images = scored(RUN, *MIXED, room=whole * 3 // 4 + words, expected=expected)
    assert sum(tile.length for tile in images.tiles) <= whole * 3 // 4
    assert all(tile.picture for tile in images.tiles)


def test_words_about_images_leave_less_room_for_pictures() -> None:
    lengths = []
    for folder in ("", "folder/" * 100):
        part = batch([0.1, 0.2, 0.3], [0, 0, 0], [f"{folder}{i}.png" for i in range(3)])
        lengths.append(sum(tile.length for tile in scored(RUN, part, room=6000).tiles))
    assert lengths[1] < lengths[0] - 2000


def test_pictures_of_good_images_with_low_scores_go_first() -> None:
    images = scored(RUN, *MIXED, room=6400)
    kept = {image.raw for image, tile in zip(images.images, images.tiles, strict=True) if tile.picture}
    assert 0 < len(kept) < 8
    ranking = [9, 8, 7, 6, 4, 5.2, 2, 1]
    assert sorted(kept) == pytest.approx(sorted(ranking[: len(kept)]))


def test_labels_of_another_threshold_are_noticed() -> None:
    images = scored(RUN, *MIXED).images
    assert told_apart_at(images, 5.0)
    assert told_apart_at(images, 5.2 + 1e-4), "rounding"
    assert not told_apart_at(images, 5.9)
    assert not told_apart_at(images, None)


def test_the_table_has_a_line_for_each_image(tmp_path: Path) -> None:
    images = [
        ScoredImage(
            "a,\"b\"\n/1.png", "1.png", 0.1, 0.25, label=True, truth=False, percentile=99.0,
            marked=Marked(640, 480, True, 1200, ((1, 2, 3, 4), (5, 6, 7, 8)), 2),
        ),
        ScoredImage("", "image 2", 1e-7, 0.5),
        ScoredImage("\udc80.png", "\udc80.png", 3.0, 0.9, marked=Marked(32, 16, False, 0, (), 0)),
    ]  # fmt: skip
    file = tmp_path / "scores.csv"
    write_scores(file, images, Scale("normalised", 0.5), "test")
    with file.open(encoding="utf-8", newline="") as opened:
        rows = [*csv.DictReader(opened)]
    assert rows[0] == {
        "run": "test", "path": 'a,"b"\n/1.png', "true_label": "good", "raw_score": "0.1", "normalised_score": "0.25",
        "decision": "defective", "percentile_of_held_out_normals": "99", "marked_area": "1200",
        "boxes": "1 2 3 4; 5 6 7 8", "frame": "file 640x480",
    }  # fmt: skip
    assert {*rows[1].values()} == {"test", "image 2", "1e-07", "0.5", ""}
    assert (rows[2]["path"], rows[2]["marked_area"], rows[2]["frame"]) == ("\\udc80.png", "0", "model 32x16")
    write_scores(file, images, RAW.scores, "predict")
    with file.open(encoding="utf-8", newline="") as opened:
        assert {row["normalised_score"] for row in csv.DictReader(opened)} == {""}


@pytest.mark.parametrize(
    ("content", "stage"), [(None, None), ("", None), ("a,b\n1,2\n", None), ("run\ntest\n", "test")]
)
def test_a_table_says_which_run_wrote_it(tmp_path: Path, content: str | None, stage: str | None) -> None:
    if content is not None:
        (tmp_path / "scores.csv").write_text(content)
    assert stage_of(tmp_path / "scores.csv") == stage
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    assert stage_of(tmp_path / "bytes.csv") is None
