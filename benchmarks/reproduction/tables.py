"""Which trainings make a table of the paper, and which of their figures stand in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from kd_multiresolution.data.base import find_class
from kd_multiresolution.results.published import Table, published_tables
from reproduction.data import DATASETS
from reproduction.settings import ATTRIBUTIONS, MAPS, PAPER_MAPS, SCORES, Settings, View, attribution_view, united


@dataclass(frozen=True)
class Case:
    """A row that we measure."""

    method: str  # name of the published row
    view: View = SCORES  # how the trained model is read for it
    last_points: int | None = None  # use the last so many critical points; `None`: all
    cloner: str = "compact"  # size of the cloner
    terms: str = "total"  # terms of the discrepancy
    augment: bool = False  # with HeadCT's augmentation


@dataclass(frozen=True)
class Plan:
    """How a table is reproduced."""

    datasets: tuple[str, ...]  # those to measure it on; the first is the default, or each has a column
    cases: tuple[Case, ...]  # the rows
    views: tuple[View, ...] = ()  # how every training is read, beyond what the rows need
    beside: tuple[str, ...] = ("image_F1",)  # metrics that are shown beside the table's own
    per_column: bool = False  # whether each column is a data set of its own
    of_scores: bool = False  # whether its figures come from scores alone, and its rows differ in nothing of the model


def _sizes_and_terms(equal: str, smaller: str) -> tuple[Case, ...]:
    """Return the rows of Tables 9 and 10, which differ in two names."""
    sizes = (Case(equal, cloner="equal"), Case(smaller))
    return (*sizes, Case("Dir Loss", terms="direction"), Case("MSE Loss", terms="value"), Case("Total Loss"))


_MAPS = (MAPS, PAPER_MAPS)
_MAP_METRICS = ("maps/pixel_AUROC", "maps/AUPRO")
_ATTRIBUTIONS = tuple(
    Case(method, attribution_view(method)) for name in ATTRIBUTIONS for method in (f"{name} + Gaussian", name)
)

PLANS: Mapping[int, Plan] = MappingProxyType(
    {
        1: Plan(("mvtec",), _ATTRIBUTIONS, beside=()),
        2: Plan(("mnist", "fashion_mnist", "cifar10", "cifar10_folder"), (Case("OURS"),), of_scores=True),
        3: Plan(("mvtec",), (Case("OURS"),), views=_MAPS, of_scores=True),
        4: Plan(("mvtec",), (Case("OURS", PAPER_MAPS),), views=_MAPS, beside=_MAP_METRICS),
        5: Plan(("retinal_oct", "resc"), (Case("OURS"),), of_scores=True),
        6: Plan(
            ("brain_mri", "head_ct"),
            (Case("OURS"), Case("OURS+AUG", augment=True)),
            per_column=True,
            of_scores=True,
        ),
        7: Plan(
            ("mvtec",),
            (Case("TheLast", last_points=1), Case("TheLast2", last_points=2), Case("TheLast4")),
        ),
        8: Plan(
            ("mnist",),
            (Case("TheLast", last_points=1), Case("TheLast2", last_points=2), Case("TheLast3")),
        ),
        9: Plan(("mvtec",), _sizes_and_terms("EqualNet", "SmallerNet")),
        10: Plan(
            ("cifar10", "cifar10_folder"),
            _sizes_and_terms("Equal Net", "Smaller Net"),
        ),
        11: Plan(("mvtec",), _ATTRIBUTIONS, beside=()),
    }
)


@dataclass(frozen=True)
class Reproduction:
    """A table and its trainings."""

    number: int  # the table's
    published: Table  # its figures
    plan: Plan  # how it is reproduced
    dataset: str | None  # the data set, `None` where each column has its own
    columns: tuple[str, ...]  # the columns to measure
    rows: tuple[str, ...]  # the rows to measure, by name
    # Of each row's columns, for one seed and split; of all rows and columns, since others may have been measured.
    cells: Mapping[Case, Mapping[str, Settings]]
    missing: Mapping[str, str] = field(default_factory=dict)  # rows that the model cannot measure, with the reason


def published_table(number: int, dataset: str | None) -> Table:
    """Return the published table of a number, each row in the order of the columns; Table 2 is one per data set."""
    name = str(number)
    if number == 2 and dataset is not None:
        name = f"2 {DATASETS[dataset].preset}"
    if number == 1:  # means of what Table 11 has class by class
        one, eleven = published_tables()["1"], published_tables()["11"]
        rows = tuple(replace(row, mean=one.row(row.method).values[0]) for row in eleven.rows)
        return replace(one, columns=eleven.columns, rows=rows)
    if number == 7:  # one row of it is printed in the order of Table 3's columns
        seven = published_tables()["7"]
        printed = dict(zip(published_tables()["3"].columns, seven.row("TheLast4").values, strict=True))
        ordered = tuple(printed[column] for column in seven.columns)
        rows = tuple(replace(row, values=ordered) if row.method == "TheLast4" else row for row in seven.rows)
        notes = (*seven.notes, "Its figures stand here below their own classes.")
        return replace(seven, rows=rows, notes=notes)
    return published_tables()[name]


def reproduction(
    number: int,
    dataset: str | None,
    classes: Sequence[str] | None,
    base: Mapping[str, Any],
    rows: Sequence[str] | None = None,
) -> Reproduction:
    """Return all that a table needs.

    Args:
        number: 1 to 11.
        dataset: one of the plan's; ``None``: the first, or all where each column has its own.
        classes: names or numbers of columns; ``None``: all.
        base: settings that all trainings share, :class:`Settings`' fields but those decided here.
        rows: names of rows, those of other tables included; ``None``: all.

    Raises:
        ValueError: if the table is not about that data set, or has no such class, or compares what only the paper's
            model has.
    """
    plan = PLANS[number]
    if base["model"] == "dual":
        if not plan.of_scores:
            able = ", ".join(str(n) for n, other in PLANS.items() if other.of_scores)
            msg = f"--table={number}: it needs maps or parts that --model=dual lacks; Tables {able} can be measured."
            raise ValueError(msg)
        plan = replace(plan, views=())
    if dataset is not None and dataset not in plan.datasets:
        msg = f"--dataset={dataset!r}: Table {number} takes {', '.join(plan.datasets)}."
        raise ValueError(msg)
    if dataset is None and not plan.per_column:
        dataset = plan.datasets[0]
    published = published_table(number, dataset)
    columns = published.columns
    if plan.per_column and dataset is not None:
        columns = (dataset,)
    if classes is not None:
        try:
            columns = tuple(columns[find_class(name, columns)] for name in classes)
        except ValueError as error:
            msg = f"--classes of Table {number}: {error}"
            raise ValueError(msg) from error
    missing = {case.method: reason for case in plan.cases if (reason := _missing(case.last_points, base)) is not None}
    cases = [case for case in plan.cases if case.method not in missing]
    measured = tuple(case.method for case in cases if rows is None or case.method in rows)
    # What is trained is read in every way that is asked for; of a row that is not, its own way will do.
    views = {case: united((*plan.views, case.view)) for case in cases}
    asked = united((*plan.views, *(case.view for case in cases if case.method in measured)))
    views |= {case: asked for case in cases if case.method in measured}
    cells = {
        case: {
            column: _settings(case, column if plan.per_column else str(dataset), column, views[case], base)
            for column in published.columns
            if not case.augment or column == "head_ct"
        }
        for case in cases
    }
    own = None if plan.per_column else dataset
    return Reproduction(number, published, plan, own, columns, measured, cells, missing)


def _missing(last_points: int | None, base: Mapping[str, Any]) -> str | None:
    """Return why a model of so many critical points cannot be measured, or ``None``."""
    points, scored = base["critical_points"], base.get("score_points") or ()
    if last_points is None:
        return None
    if last_points >= len(points):
        return f"of {len(points)} critical points the last {last_points} are all"
    if lacking := [point for point in scored if point not in points[-last_points:]]:
        return f"it has no {', '.join(lacking)} to score"
    return None


def _settings(case: Case, dataset: str, column: str, views: tuple[View, ...], base: Mapping[str, Any]) -> Settings:
    preset = DATASETS[dataset].settings
    fields: dict[str, Any] = {
        "image_size": preset.image_size,
        "resize": preset.resize,
        "imagenet_normalization": preset.imagenet_normalization,
        "value_weight": preset.value_weight,
        "epochs": preset.epochs if base["model"] == "paper" else None,
        **base,
    }
    if "image_size" in base:
        fields["resize"] = None  # the cut belongs to the preset's size
    if case.last_points is not None:
        fields["critical_points"] = fields["critical_points"][-case.last_points :]
    return Settings(
        dataset=dataset,
        normal_class=column if DATASETS[dataset].class_argument else "",
        seed=0,
        split=0 if DATASETS[dataset].splits else None,
        augment=case.augment,
        cloner=case.cloner,
        terms=case.terms,
        views=views,
        **fields,
    )
