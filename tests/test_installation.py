"""The wheel, installed into an environment of its own: what it brings, what it does unasked, and what stays behind.

The environments see the packages of the one that runs the tests, but not its start-up files: whatever happens there at
interpreter start comes from the wheel.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

PROJECT = Path(__file__).parents[1]
START_UP = {"_kd_multiresolution_startup.py", "kd_multiresolution.pth", "kd_multiresolution.start"}
FINDERS = "[type(finder).__name__ for finder in sys.meta_path]"


@dataclass(frozen=True)
class Environment:
    """A virtual environment without pip."""

    root: Path
    python: str
    packages: Path

    def run(self, code: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run Python code as a user's program would run, away from the checkout."""
        return call(self.python, "-c", code, cwd=self.root, **variables)

    def pip(self, command: str, *arguments: str) -> None:
        call(sys.executable, "-m", "pip", "--python", self.python, command, *arguments, cwd=self.root)

    def install(self, *what: str) -> None:
        # --ignore-installed: the package in the surrounding environment is visible here as well.
        self.pip("install", "--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed", *what)

    def files(self) -> set[Path]:
        return {path.relative_to(self.root) for path in self.root.rglob("*") if not path.is_dir()}


def call(*command: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_", "KD_"))}
    environment = {**kept, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **variables}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    call(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder), cwd=PROJECT)
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture
def make_environment(tmp_path: Path) -> Callable[..., Environment]:
    """Make an environment; ``alone``: without the packages of the surrounding one."""

    def make(*, alone: bool = False) -> Environment:
        root = tmp_path / "environment"
        builder = venv.EnvBuilder(symlinks=True)
        builder.create(root)
        python = builder.ensure_directories(root).env_exe
        where = "import sysconfig; print(sysconfig.get_path('purelib'))"
        environment = Environment(root, python, Path(call(python, "-c", where, cwd=root).stdout.strip()))
        if not alone:
            outer = [path for path in sys.path if Path(path).name in {"site-packages", "dist-packages"}]
            (environment.packages / "outer.pth").write_text("\n".join(outer))
        return environment

    return make


@pytest.fixture
def environment(make_environment: Callable[..., Environment], wheel: Path) -> Environment:
    """An environment with the wheel."""
    environment = make_environment()
    environment.install(str(wheel))
    return environment


def test_wheel_holds_what_it_needs_and_nothing_else(wheel: Path) -> None:
    source = PROJECT / "src" / "kd_multiresolution"
    modules = {str(path.relative_to(source.parent)) for path in source.rglob("*.py")}
    data = ("py.typed", "results/published/tables.json")
    others = {f"kd_multiresolution/{name}" for name in data}
    others |= {str(path.relative_to(source.parent)) for path in (source / "results" / "page_files").iterdir()}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    metadata = {name for name in names if re.match(r"kd_multiresolution-[\d.]+\.dist-info/", name)}
    assert {Path(name).name for name in metadata} == {"METADATA", "WHEEL", "RECORD", "LICENSE", "entry_points.txt"}
    assert names - metadata == modules | others | START_UP
    assert wheel.stat().st_size < 1e6


def test_both_start_up_files_call_the_same_function(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        lines = {name: archive.read(name).decode().strip() for name in START_UP if not name.endswith(".py")}
    module, function = lines["kd_multiresolution.start"].split(":")
    assert lines["kd_multiresolution.pth"] == f"import {module}; {module}.{function}()"


def test_model_and_data_are_found_without_any_action(environment: Environment) -> None:
    done = environment.run(
        "from anomalib.models import get_model, list_models\n"
        "import anomalib.data, sys\n"
        "for name in ('kd_multiresolution', 'kd_multiresolution_dual'):\n"
        "    assert name in list_models()\n"
        "    model = get_model(name, source='efficientnet_lite0', image_size=64)\n"  # with its weights
        "    print(sys.modules[type(model).__module__].__file__)\n"
        "assert anomalib.data.TextureDefects.__module__.startswith('kd_multiresolution.')"
    )
    files = [Path(line) for line in done.stdout.splitlines()]
    assert [file.parent.name for file in files] == ["paper", "dual"]
    assert all(file.is_relative_to(environment.packages) for file in files)
    assert "RuntimeWarning" not in done.stderr


@pytest.mark.parametrize("name", ["KdMultiresolution", "KdMultiresolutionDual"])
def test_switched_off_the_dotted_path_still_works(name: str, environment: Environment) -> None:
    environment.run(
        "import sys\n"
        "from anomalib.cli.cli import AnomalibCLI\n"
        "from anomalib.models import list_models\n"
        "assert 'kd_multiresolution' not in list_models() and 'kd_multiresolution' not in sys.modules\n"
        "arguments = ['--model.source=efficientnet_lite0', '--model.image_size=64']\n"
        f"cli = AnomalibCLI(['fit', '--model', 'kd_multiresolution.{name}', *arguments], run=False)\n"
        f"assert type(cli.model).__name__ == '{name}'\n"
        f"assert '{re.sub('(?<=[a-z])(?=[A-Z])', '_', name).lower()}' in list_models()",
        KD_MULTIRESOLUTION_AUTOLOAD="0",
    )


BROKEN = {
    "paper/lightning_model.py": {"kd_multiresolution"},
    "dual/lightning_model.py": {"kd_multiresolution_dual"},
    "__init__.py": {"kd_multiresolution", "kd_multiresolution_dual"},
}


@pytest.mark.parametrize("module", BROKEN)
def test_a_fault_of_ours_leaves_anomalib_whole(module: str, environment: Environment) -> None:
    (environment.packages / "kd_multiresolution" / module).write_text("raise RuntimeError('broken on purpose')\n")
    done = environment.run(
        "import anomalib.data, anomalib.models\n"
        "names = anomalib.models.list_models()\n"
        f"assert 'padim' in names and not {BROKEN[module]} & {{*names}}"
    )
    warnings = [line for line in done.stderr.splitlines() if "RuntimeWarning" in line]
    assert len(warnings) == 1, done.stderr
    assert "kd_multiresolution could not be loaded" in warnings[0]
    assert "RuntimeError: broken on purpose" in warnings[0]


def test_interpreter_start_imports_only_the_hook(environment: Environment) -> None:
    loaded = environment.run("import sys; print(*sys.modules)").stdout.split()
    assert "_kd_multiresolution_startup" in loaded
    assert not {"torch", "anomalib", "kd_multiresolution", "importlib.metadata"} & set(loaded)


def test_hook_is_put_in_place_once(environment: Environment) -> None:
    again = "import sys, _kd_multiresolution_startup as hook; hook.install(); "
    assert environment.run(f"{again} print({FINDERS}.count('_AnomalibFinder'))").stdout == "1\n"


@pytest.mark.parametrize(
    ("value", "on"), [("0", False), ("false", False), (" No ", False), ("OFF", False), ("1", True), ("", True)]
)
def test_values_of_the_off_switch(environment: Environment, value: str, on: bool) -> None:
    done = environment.run(f"import sys; print('_AnomalibFinder' in {FINDERS})", KD_MULTIRESOLUTION_AUTOLOAD=value)
    assert done.stdout == f"{on}\n"


def test_without_anomalib_the_hook_is_silent(make_environment: Callable[..., Environment], wheel: Path) -> None:
    environment = make_environment(alone=True)
    environment.install(str(wheel))
    done = environment.run(
        "try:\n    import anomalib.models\nexcept ModuleNotFoundError as error:\n    print(error.name)"
    )
    assert (done.stdout, done.stderr) == ("anomalib\n", "")


def test_editable_installation_has_the_hook_too(make_environment: Callable[..., Environment]) -> None:
    environment = make_environment()
    environment.install("-e", str(PROJECT))
    done = environment.run(f"import sys, kd_multiresolution; print(kd_multiresolution.__file__, *{FINDERS})")
    file, *finders = done.stdout.split()
    assert Path(file).is_relative_to(PROJECT / "src")
    assert "_AnomalibFinder" in finders


def test_uninstalling_leaves_nothing_behind(make_environment: Callable[..., Environment], wheel: Path) -> None:
    environment = make_environment()
    before = environment.files()
    environment.install(str(wheel))
    brought = {path.name for path in environment.files() - before}
    assert brought >= {*START_UP, "lightning_model.py"}
    environment.run("import kd_multiresolution")  # leaves byte code
    environment.pip("uninstall", "--yes", "kd-multiresolution")
    assert environment.files() == before
    assert environment.run(f"import sys; print('_AnomalibFinder' in {FINDERS})").stdout == "False\n"
