"""What the programs share: they work in silence, in processes of their own, and leave JSON and Markdown behind."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import multiprocessing
import os
import platform
import resource
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, TypeVar

import torch

PACKAGES = ("kd-multiresolution", "anomalib", "torch", "torchvision", "lightning", "timm", "kornia", "scikit-learn")
MIB = 2**20
T = TypeVar("T")


@dataclass(frozen=True)
class Record:
    """All that decides the figures of one training: the fields of a subclass."""

    @property
    def name(self) -> str:
        """A short name for people."""
        raise NotImplementedError

    def as_json(self) -> dict[str, Any]:
        """Return plain data."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    @property
    def stem(self) -> str:
        """The name, and a digest of everything: what its files are called."""
        text = json.dumps(self.as_json(), sort_keys=True)
        return f"{self.name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def in_own_process(function: Callable[..., T], *arguments: Any) -> T:
    """Return what a function returns in a new process.

    Raises:
        BrokenProcessPool: if the process was killed.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def quiet() -> None:
    """Have Lightning and anomalib not tell of chosen devices, frozen modules and deprecations at each training."""
    warnings.filterwarnings("ignore", module=r"lightning\.")
    for name in ("lightning.pytorch", "lightning_fabric", "anomalib"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _on_a_gpu() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def now() -> float:
    """Return a clock's seconds, read when a GPU that is in use has done what it was asked for."""
    if _on_a_gpu():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_mib() -> dict[str, float | None]:
    """Return the largest memory that this process has had so far, and its tensors on a GPU."""
    return {
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB,
        "device_mib": torch.cuda.max_memory_allocated() / MIB if _on_a_gpu() else None,
    }


def environment() -> dict[str, Any]:
    """Return what figures are computed with."""
    return {
        "python": platform.python_version(),
        "packages": {package: version(package) for package in PACKAGES},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "threads": torch.get_num_threads(),
    }


def in_a_line(error: Exception, longest: int = 400) -> str:
    """Return kind and text of an error in one line: of a loader process's the last, below its traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].startswith("Caught "):
        return lines[-1]
    return f"{type(error).__name__}: {' '.join(lines)[:longest]}"


def line(cells: Iterable[object]) -> str:
    """Return a row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def markdown(head: Sequence[str], rows: Iterable[Iterable[object]], numbers_from: int = 1) -> str:
    """Return a Markdown table, its numbers to the right."""
    rule = ["---"] * numbers_from + ["---:"] * (len(head) - numbers_from)
    return "\n".join([line(head), line(rule), *map(line, rows)]) + "\n"


def positive(text: str) -> int:
    """Return a number of 1 or more."""
    return _whole(text, 1)


def natural(text: str) -> int:
    """Return a number of 0 or more."""
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    if not text.isdecimal() or int(text) < least:
        msg = f"{text}: expected a whole number, {least} or more."
        raise argparse.ArgumentTypeError(msg)
    return int(text)


def make_folder(argument: str, folder: Path) -> None:
    """Make the folder that an argument names, before hours of work whose results are to lie there.

    Raises:
        SystemExit: if it cannot be made, or nothing can be written to it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        msg = f"{argument}={folder}: nothing can be written there ({error.strerror}). Name another folder."
        raise SystemExit(msg) from error


def write_whole(path: Path, result: object) -> Path:
    """Write a JSON file, and its folder; the file is never there in part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.unfinished")
    unfinished.write_text(json.dumps(result, indent=2) + "\n")
    unfinished.replace(path)
    return path


def write_both(output: Path, result: object, text: str) -> None:
    """Write and print what was found.

    Args:
        output: the files' name without suffix.
        result: for the JSON file.
        text: for the Markdown file, and the screen.
    """
    write_whole(output.with_suffix(".json"), {"environment": environment(), "result": result})
    output.with_suffix(".md").write_text(text)
    print(text)
