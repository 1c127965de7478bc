"""The figures of Tables 1 to 11 of arXiv 2011.11108, competitors included, as data.

They stand as they were printed; what is wrong in the paper is noted with the table, not corrected.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        method: its name in the paper; ``OURS`` is the paper's method.
        values: in percent, one per column; ``None`` where the paper has a dash.
        spread: the paper's "±", over late epochs of one training; ``None`` where it gives none.
        mean: the mean column as printed, ``None`` where the table has none.
    """

    method: str
    values: tuple[float | None, ...]
    spread: tuple[float | None, ...] | None = None
    mean: float | None = None


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        caption: what it shows.
        metric: the metric's name in :func:`kd_multiresolution.results.raw_metrics.raw_metrics`.
        columns: classes, categories or data sets, in the order of the paper.
        rows: the methods.
        notes: the paper's own slips.
    """

    caption: str
    metric: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    def row(self, method: str) -> Row:
        """Return the row of a method.

        Raises:
            KeyError: if there is none of that name.
        """
        for row in self.rows:
            if row.method == method:
                return row
        msg = f"method={method!r}: expected one of {', '.join(row.method for row in self.rows)}."
        raise KeyError(msg)


@cache
def published_tables() -> Mapping[str, Table]:
    """Return all tables by their numbers; Table 2 is three, ``2 mnist``, ``2 fashion_mnist`` and ``2 cifar10``.

    Example:
        >>> published_tables()["6"].row("OURS").values
        (95.01, 78.04)
    """
    text = files(__name__).joinpath("tables.json").read_text(encoding="utf-8")
    return MappingProxyType({name: _table(table) for name, table in json.loads(text).items()})


def _table(table: dict[str, Any]) -> Table:
    rows = tuple(Row(**_tuples(row)) for row in table.pop("rows"))
    return Table(rows=rows, **_tuples(table))


def _tuples(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields with tuples in place of JSON's lists."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
