"""The program ``kd-multiresolution-threshold``: anomalib's command line takes no further commands."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jsonargparse import ArgumentParser

from kd_multiresolution.line.threshold import set_threshold
from kd_multiresolution.plugin.image_files import READING_ERRORS


def parser() -> ArgumentParser:
    """Return what understands the arguments, which are those of :func:`set_threshold`."""
    description = (set_threshold.__doc__ or "").partition("\n")[0]
    program = ArgumentParser(prog="kd-multiresolution-threshold", description=description)
    program.add_function_arguments(set_threshold, as_group=False)
    return program


def main(arguments: Sequence[str] | None = None) -> None:
    """Set the thresholds of a checkpoint again, and say what has changed."""
    program = parser()
    given = program.parse_args(arguments)
    try:
        change = set_threshold(**given.as_dict())
    except (ValueError, *READING_ERRORS) as error:
        program.exit(2, f"{program.prog}: {error}\n")
    sys.stdout.write(f"{change}\n")
