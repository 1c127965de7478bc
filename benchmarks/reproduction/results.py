"""Results as files: one per training, written at once or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reporting import write_whole
from reproduction.settings import SCORES, Settings


class Results:
    """A folder of results.

    Args:
        folder: made when the first result is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __iter__(self) -> Iterator[tuple[Settings, dict[str, Any]]]:
        """Yield all results with their settings.

        Raises:
            ValueError: if a file cannot be understood.
        """
        for path in sorted(self.folder.glob("*.json")):
            try:
                result = json.loads(path.read_text())
                settings = Settings.from_json(result["settings"])
            except (KeyError, TypeError, ValueError) as error:
                msg = f"{path}: no result of this version ({error}). Move it away; its training is then done again."
                raise ValueError(msg) from error
            yield settings, result

    def find(self, settings: Settings) -> Settings | None:
        """Return what is stored of a training with these settings that was read in these ways at least, or ``None``."""
        for stored, _ in self:
            if stored.training == settings.training and covers(stored, settings):
                return stored
        return None

    def write(self, settings: Settings, result: dict[str, Any]) -> Path:
        """Write a result; a file of that name is never there in part."""
        return write_whole(self.folder / f"{settings.stem}.json", result)


def covers(stored: Settings, wanted: Settings) -> bool:
    """Whether a result has all views that are wanted; every view has the scores."""
    return set(wanted.views) - {SCORES} <= set(stored.views)
