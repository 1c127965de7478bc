"""Shared data and small networks. What is not there makes its tests skip, with the reason."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentParser
from xdist.scheduler import LoadScopeScheduling

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is imported: one worker per core, one thread per worker, and for the processes that it starts.
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")

import tests.small_vgg  # noqa: F401 - a model of timm's from here on

SHARED = Path(os.environ.get("KD_SHARED", Path(__file__).parents[2] / "shared"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests that take long, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("slow")])
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """A module's tests run in one process, which makes the models that they share once."""
    return LoadScopeScheduling(config, log)


def shared_path(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs {name} in {SHARED} (set KD_SHARED to the folder that has it)")
    return path


@pytest.fixture(scope="session")
def vectors() -> Path:
    return shared_path("vectors")


@pytest.fixture(scope="module")
def anomalib_parser() -> ArgumentParser:
    """Return anomalib's command line, which starts nothing."""
    from anomalib.cli.cli import AnomalibCLI  # seconds, which most tests do not need

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AnomalibCLI, "before_instantiate_classes", lambda self: None)
        patch.setattr(AnomalibCLI, "instantiate_classes", lambda self: None)
        return AnomalibCLI(["train", "--model", "kd_multiresolution", "--data", "MVTecAD"], run=False).parser
