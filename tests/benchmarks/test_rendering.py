"""Tables rendered from results written by hand."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest

from reproduction.rendering import measured, render
from reproduction.results import Results
from reproduction.settings import Settings
from reproduction.tables import Reproduction, reproduction

BASE: dict[str, Any] = {
    "source": "vgg16.tv_in1k", "pretrained": True, "weights": None, "weights_sha256": "abc", "batch_size": 64,
    "critical_points": ("pool2", "pool3", "pool4", "pool5"), "evaluations": 5, "interval": 10, "epochs": None,
    "limit": None, "model": "paper",
}  # fmt: skip


def only(table: Reproduction) -> tuple[Any, Any]:
    ((case, columns),) = table.cells.items()
    return case, columns


def write(results: Results, settings: Settings, *values: float, view: str = "scores") -> None:
    figure = {"mean": mean(values), "std": stdev(values) if len(values) > 1 else None, "values": list(values)}
    metrics = {f"{view}/image_AUROC": figure, f"{view}/image_F1": {"mean": 0.5, "std": None, "values": [0.5]}}
    result = {"settings": settings.as_json(), "metrics": metrics, "epochs": 90, "converged_after": 50}
    results.write(settings, result)


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return Results(tmp_path)


def repeat(settings: Settings, **changes: int) -> Settings:
    return Settings.from_json({**settings.as_json(), **changes})


def test_each_spread_is_named_after_what_is_repeated(results: Results) -> None:
    table = reproduction(6, "brain_mri", None, BASE)
    case, columns = next(iter(table.cells.items()))
    wanted = columns["brain_mri"]
    for split, seed, values in ((0, 0, (0.90, 0.92)), (0, 1, (0.94, 0.94)), (1, 0, (0.80, 0.84)), (1, 1, (0.86, 0.86))):
        write(results, repeat(wanted, split=split, seed=seed), *values)
    cell = measured(results, case, wanted, "image_AUROC", ("image_F1",))
    assert cell is not None
    assert cell.mean == pytest.approx(mean([91, 94, 82, 86]))
    assert cell.over_epochs == pytest.approx(mean([stdev([90, 92]), 0, stdev([80, 84]), 0]))
    assert cell.over_seeds == pytest.approx(mean([stdev([91, 94]), stdev([82, 86])]))
    assert cell.over_splits == pytest.approx(stdev([92.5, 84]))
    assert (cell.trainings, cell.evaluations, cell.converged) == (4, 2, 4)
    assert cell.beside == {"image_F1": 50}
    line = next(line for line in render(table, results, {}).splitlines() if line.startswith("| brain_mri"))
    cells = [text.strip() for text in line.strip("|").split("|")]
    assert cells == [
        "brain_mri", "95.01 ± 0.229", "88.25", "1.06 (2)", "2.47 (2)", "6.01 (2)", "-6.76", "90", "4 of 4", "50.00",
    ]  # fmt: skip


def test_the_mean_is_compared_over_the_same_classes(results: Results) -> None:
    table = reproduction(2, "mnist", None, BASE)
    _, columns = only(table)
    write(results, columns["zero"], 0.99)
    write(results, columns["two"], 0.97)
    lines = render(table, results, {}).splitlines()
    # Published for these two: 99.82 and 97.79.
    assert "| **mean of these 2** | 98.81 | 98.00 |  |  |  | -0.81 |" in "\n".join(lines)
    assert sum(line.endswith("| – | – | – | – | – | – | – | – |") for line in lines) == 8
    for column in columns:
        write(results, columns[column], 0.98)
    assert "| **mean** | 98.71 | 98.00 |  |  |  | -0.71 |" in render(table, results, {})


def test_one_evaluation_has_no_spread_and_a_short_run_says_so(results: Results) -> None:
    table = reproduction(2, "mnist", ["0"], {**BASE, "limit": 5, "epochs": 2})
    _, columns = only(table)
    write(results, columns["zero"], 0.5)
    text = render(table, results, {})
    assert "| zero | 99.82 ± 0.023 | 50.00 | – (1) | – (1) | – | -49.82 |" in text
    assert "A short run: 5 training images" in text
    assert "limited to 2 epochs" in text


def test_results_of_other_settings_do_not_mix(results: Results) -> None:
    long, short = (reproduction(2, "mnist", ["0"], {**BASE, "limit": limit}) for limit in (None, 5))
    write(results, only(short)[1]["zero"], 0.5)
    assert "50.00" not in render(long, results, {})
    assert "50.00" in render(short, results, {})


def test_notes_and_competitors_stand_below(results: Results) -> None:
    text = render(reproduction(7, None, None, BASE), results, {"screw": "OSError: no such file"})
    assert text.index("## TheLast2") < text.index(
        "Critical points pool4, pool5; cloner compact; terms total; value weight 0.5."
    )
    assert "in the column order of Table 3" in text
    assert "- screw failed: OSError: no such file" in text
    assert "Other methods" not in text
    assert "GT* 67.06" in render(reproduction(3, None, None, BASE), results, {})


def test_table_7_is_compared_class_by_class(results: Results) -> None:
    table = reproduction(7, None, ["pill"], BASE)
    case, columns = next((v, c) for v, c in table.cells.items() if v.method == "TheLast4")
    assert case.last_points is None
    write(results, columns["pill"], 0.8)
    assert "| pill | 82.70 | 80.00 |" in render(table, results, {})


def test_what_was_measured_before_stays_in_the_table(results: Results) -> None:
    whole = reproduction(2, "mnist", None, BASE)
    write(results, only(whole)[1]["two"], 0.97)
    text = render(reproduction(2, "mnist", ["0"], BASE), results, {})
    assert "| two | 97.79 ± 0.272 | 97.00 |" in text
    assert "| zero | 99.82 ± 0.023 | – |" in text
    assert "| one |" not in text


def test_seeds_and_splits_are_counted_and_every_split_counts_alike(results: Results) -> None:
    table = reproduction(6, "brain_mri", None, BASE)
    case, columns = next(iter(table.cells.items()))
    for split, seed, value in ((0, 0, 0.8), (0, 1, 0.8), (0, 2, 0.8), (4, 0, 0.6)):
        write(results, repeat(columns["brain_mri"], split=split, seed=seed), value)
    cell = measured(results, case, columns["brain_mri"], "image_AUROC", ())
    assert cell is not None
    assert cell.mean == pytest.approx(70)
    assert "| brain_mri | 95.01 ± 0.229 | 70.00 | – (1) | 0.00 (3) | 14.14 (2) |" in render(table, results, {})


def test_rows_that_need_more_critical_points_are_named() -> None:
    table = reproduction(7, None, ["pill"], {**BASE, "critical_points": ("pool4", "pool5")})
    assert [case.method for case in table.cells] == ["TheLast", "TheLast4"]
    assert table.missing == {"TheLast2": "of 2 critical points the last 2 are all"}


def test_a_file_that_is_no_result_is_named(results: Results, tmp_path: Path) -> None:
    (tmp_path / "half.json").write_text('{"settings": {')
    with pytest.raises(ValueError, match=r"half\.json: no result of this version"):
        list(results)
