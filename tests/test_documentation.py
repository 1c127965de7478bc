"""The commands that the documentation shows: they are run, or at least accepted by the program that they name."""

from __future__ import annotations

import argparse
import ast
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from anomalib.models import get_model, list_models
from jsonargparse import ArgumentParser

from tests.data.generated import write_noise_folders

PROJECT = Path(__file__).parents[1]
PAGES = (*PROJECT.glob("*.md"), *(PROJECT / "docs").glob("*.md"), *(PROJECT / "configs").glob("*.yaml"))
QUICK = ("--model.source", "efficientnet_lite0", "--model.image_size", "64", "--trainer.accelerator", "cpu")


class Accepted(Exception):  # noqa: N818
    """The arguments have been parsed; the program need not go on."""


def commands(page: Path) -> Iterator[str]:
    """Yield the commands of a page, from blocks, between backquotes, and in a configuration's first lines.

    ``anomalib benchmark`` has its own parser and test (test_configurations); options named alone are no commands.
    """
    text = page.read_text()
    blocks, rest = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL), re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += [re.sub(r"\s+", " ", quoted) for quoted in re.findall(r"`([^`]+)`", rest)]
    lines += re.findall(r"^# .*: (anomalib .*)$", rest, re.MULTILINE) if page.suffix == ".yaml" else []
    for line in lines:
        command = line.split(" && ")[-1]
        if re.match(r"anomalib (?!benchmark)\w+ .*--(config|model) |python (benchmarks|examples)/\S+ \S", command):
            yield command


ALL = [(page.name, command) for page in sorted(PAGES) for command in commands(page)]


def of(program: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("command", sorted({command for _, command in ALL if command.startswith(program)}))


def test_every_page_with_commands_is_read() -> None:
    pages = {page for page, _ in ALL}
    assert {"README.md", "deployment.md", "own_data.md", "reproduce.md", "speed.md", "mvtec.yaml"} <= pages


@of("anomalib")
def test_anomalib_accepts(command: str, anomalib_parser: ArgumentParser, monkeypatch: pytest.MonkeyPatch) -> None:
    _, subcommand, *arguments = shlex.split(command)
    monkeypatch.chdir(PROJECT)
    parsed = anomalib_parser.parse_args([subcommand, *arguments])
    assert parsed[subcommand].model.class_path.startswith("kd_multiresolution.")


@of("python")
def test_programs_accept(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, script, *arguments = shlex.split(command)
    parse = argparse.ArgumentParser.parse_args

    def accepted(parser: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> None:
        parse(parser, args, namespace)
        raise Accepted

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", accepted)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    with pytest.raises(Accepted):
        runpy.run_path(str(PROJECT / script), run_name="__main__")


PROGRAMS = {page.name: re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL) for page in PAGES}


@pytest.mark.parametrize("page", sorted(page for page, programs in PROGRAMS.items() if programs))
def test_programs_import_what_there_is(page: str) -> None:
    for program in PROGRAMS[page]:
        imports = [node for node in ast.walk(ast.parse(program)) if isinstance(node, (ast.Import, ast.ImportFrom))]
        assert imports
        exec(compile(ast.Module(imports, type_ignores=[]), page, "exec"), {})


@pytest.mark.slow
def test_own_data_from_training_to_new_images(tmp_path: Path) -> None:
    write_noise_folders(tmp_path / "parts", 8, (80, 80))
    (tmp_path / "parts" / "bad").rename(tmp_path / "parts" / "defect")
    (tmp_path / "new").mkdir()
    (tmp_path / "parts" / "good" / "0.png").rename(tmp_path / "new" / "a.png")
    train, predict = (line for line in commands(PROJECT / "docs" / "own_data.md") if "--model " in line)
    for command in (f"{train} --model.epochs 1", predict):
        _, *arguments = shlex.split(command)
        program = str(Path(sys.executable).with_name("anomalib"))
        done = subprocess.run(
            [program, *arguments, *QUICK], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    results = tmp_path / "results" / "KdMultiresolution" / "parts" / "latest"
    for name in ("report.html", "scores.csv", "weights/lightning/model.ckpt", "images/good", "images/defect"):
        assert (results / name).exists(), name
    assert list(tmp_path.rglob("images/**/a.png")), "the new image has a heat map"


STUDIO_FAMILIES = {
    "memory_bank", "distribution", "reconstruction", "student_teacher", "gan_based", "transformer",
    "foundation", "other",
}  # fmt: skip


def test_studio_finds_the_models_of_its_entries() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", (PROJECT / "docs" / "studio.md").read_text(), re.DOTALL)
    entries = yaml.safe_load(block)
    assert {entry["id"] for entry in entries} == {name for name in list_models("snake") if "multires" in name}
    for entry in entries:
        expected = "id name description family recommended license metrics parameters supported"
        assert [*entry] == expected.split()
        assert {*entry["family"]} <= STUDIO_FAMILIES
        assert {*entry["metrics"].values()} <= {1, 2, 3}
        model = get_model(entry["id"], pretrained=False)
        assert sum(weight.numel() for weight in model.parameters()) / 1e6 == pytest.approx(
            entry["parameters"], abs=0.05
        )
