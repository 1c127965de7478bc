"""Each option that a page names, in a command or alone, is one of what it is said of, and changes something there."""

from __future__ import annotations

import re
import shlex
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import anomalib.data
import pytest
import yaml
from jsonargparse import ArgumentParser, Namespace

from kd_multiresolution import KdMultiresolution, KdMultiresolutionDual
from tests.data.effects import another, changes_anything
from tests.data.generated import write_image, write_noise_folders
from tests.test_documentation import PAGES, PROJECT, commands

OTHERS = {"MVTecAD": {"category": "screw"}, "TextureDefects": {"category": "gravel"}}
ABSENT = {"mask_dir": "masks", "normal_test_dir": "masks"}  # to start from where a command does without


@cache
def parsed(parser: ArgumentParser, page: Path) -> list[Namespace]:
    """Return what the program understands of a page's commands."""
    words = [shlex.split(command)[1:] for command in commands(page) if command.startswith("anomalib")]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(PROJECT)
        return [parser.parse_args(command)[command[0]] for command in words]


def named(page: Path, group: str) -> list[str]:
    """Return the options of a group that a page names, a configuration's own included."""
    text = page.read_text()
    options = set(re.findall(rf"--{group}\.(\w+)", text)) - {"help"}
    if page.suffix == ".yaml":
        options |= (yaml.safe_load(text).get(group) or {}).get("init_args", {}).keys()
    return sorted(options)


def options(*groups: str) -> list[Any]:
    found = [(page, group, name) for page in sorted(PAGES) for group in groups for name in named(page, group)]
    return [pytest.param(*option, id="-".join((option[0].name, *option[1:]))) for option in found]


def own_arguments(command: Namespace, group: str) -> Namespace:
    """Return the arguments of what a command configures; a path given as data has none."""
    configured = command.get(group)
    return getattr(configured, "init_args", configured) if isinstance(configured, Namespace) else Namespace()


@pytest.mark.slow
@pytest.mark.parametrize(("page", "group", "name"), options("data", "model", "trainer"))
def test_there_is_such_an_option(page: Path, group: str, name: str, anomalib_parser: ArgumentParser) -> None:
    everywhere = [command for other in PAGES for command in parsed(anomalib_parser, other)]
    assert any(name in own_arguments(command, group) for command in everywhere)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with the folders that the pages speak of, and others beside them."""
    root = tmp_path_factory.mktemp("pages")
    write_noise_folders(root / "parts", 8)
    (root / "parts" / "bad").rename(root / "parts" / "defect")
    for name in ("masks", "other"):
        shutil.copytree(root / "parts" / "defect", root / "parts" / name)
    shutil.copytree(root / "parts", root / "other")
    for category in ("bottle", "pill", "screw"):
        for folder in ("train/good", "test/good", "test/broken"):
            for number in range(4):
                write_image(root / "datasets" / "MVTecAD" / category / folder / f"{number}.png", number)
                mask = root / "datasets" / "MVTecAD" / category / "ground_truth" / "broken" / f"{number}_mask.png"
                write_image(mask, number)
    return root


@pytest.mark.slow
@pytest.mark.parametrize(("page", "group", "name"), options("data"))
def test_an_option_of_data_changes_something(
    page: Path, group: str, name: str, anomalib_parser: ArgumentParser, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pictures)
    # Of the page's own commands, if one of them has it.
    candidates = [command for other in (page, *sorted(PAGES)) for command in parsed(anomalib_parser, other)]
    command = next(command for command in candidates if name in own_arguments(command, group))
    kind = command.data.class_path.rpartition(".")[2]
    if page.suffix == ".yaml" and kind not in {"Folder", "MVTecAD", "TextureDefects"}:
        pytest.skip("its data are not here; tests/data has tests of its arguments")
    given = {**command.data.init_args.as_dict(), "num_workers": 0}
    if given[name] is None:
        given[name] = ABSENT[name]
    value = OTHERS.get(kind, {}).get(name) or another(given[name])
    assert changes_anything(getattr(anomalib.data, kind), given, name, value)


@pytest.mark.parametrize("model", [KdMultiresolution, KdMultiresolutionDual])
def test_no_option_of_the_trainer_is_taken_out_of_the_users_hands(model: Any) -> None:
    documented = {name for page in PAGES for name in named(page, "trainer")}
    assert documented.isdisjoint(model("small_vgg", image_size=64).trainer_arguments)
