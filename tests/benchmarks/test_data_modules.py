"""The measurement of the data modules' start, on the smallest of them."""

from __future__ import annotations

from pathlib import Path

import pytest

import data_modules


@pytest.mark.parametrize(("name", "train", "test"), [("BrainMRI", 88, 165), ("HeadCT", 90, 110)])
def test_a_stand_in_has_the_published_number_of_images(tmp_path: Path, name: str, train: int, test: int) -> None:
    data_modules.write_stand_in(name, tmp_path)
    start = data_modules.start(name, tmp_path)
    assert (start.train, start.test) == (train, test)
    assert start.seconds > 0


def test_a_stand_in_for_the_digits_is_read_as_they_are(tmp_path: Path) -> None:
    data_modules.write_stand_in("OneClassFashionMNIST", tmp_path)
    start = data_modules.start("OneClassFashionMNIST", tmp_path)
    assert (start.train, start.test) == (6_000, 10_000)


def test_the_table_has_the_slowest_and_the_largest_of_the_repetitions() -> None:
    starts = [data_modules.Start(1.0, 0.5, 20.0, 1_000, 10), data_modules.Start(0.5, 0.75, 30.0, 1_000, 10)]
    text = data_modules.render({"OneClassFolder": starts}, {"OneClassFolder": Path("there")})
    assert "| OneClassFolder | published | 1,000 | 10 | 1.00 | 0.75 | 30 |" in text


def test_what_cannot_be_measured_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--data", "Cows=."], "expected NAME=FOLDER"),
        (["--modules", "OneClassCIFAR10"], "name their folder with --data"),
    ):
        with pytest.raises(SystemExit):
            data_modules.main(arguments)
        assert message in capsys.readouterr().err
