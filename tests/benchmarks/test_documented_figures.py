"""The documentation's tables of the paper follow from the results that are kept, by the commands beside them."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest
from tests.conftest import shared_path
from tests.test_documentation import PROJECT, commands

import reproduce
from reproduction.settings import Settings

RESULTS = Path("benchmarks/results/reproduce")
WEIGHTS = {
    "vgg16.safetensors": "vgg16.tv_in1k-features.safetensors",
    "resnet18.safetensors": "resnet18.tv_in1k-conv1-to-layer3.safetensors",
}
COMMANDS = sorted(
    {
        command
        for page in ("published_figures.md", "anomaly_maps.md")
        for command in commands(PROJECT / "docs" / page)
        if "reproduce.py" in command and f"--output {RESULTS}" in command
    }
)


def _no_training(settings: Settings, *_: object) -> None:
    msg = f"{settings.name}: no result of it is kept"
    raise AssertionError(msg)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_has_its_results_and_writes_its_tables(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, file in WEIGHTS.items():
        (tmp_path / name).symlink_to(shared_path(f"data/weights/{file}"))
    shutil.copytree(PROJECT / RESULTS, tmp_path / RESULTS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "run", _no_training)
    arguments = shlex.split(command)[2:]
    if "--checkpoints" in arguments:  # no models are kept, which would be trained for it
        position = arguments.index("--checkpoints")
        del arguments[position : position + 2]

    assert reproduce.main(arguments) == 0

    assert ": 0 trainings to do" in capsys.readouterr().out
    for written in (tmp_path / RESULTS).rglob("*.md"):
        kept = PROJECT / written.relative_to(tmp_path)
        assert written.read_text() == kept.read_text(), kept
