"""Lets anomalib find the models and data modules of ``kd_multiresolution`` without any action of the user.

Python runs :func:`install` at interpreter start (``kd_multiresolution.pth``; from Python 3.15 on
``kd_multiresolution.start``). It puts one finder first in ``sys.meta_path`` and imports nothing. When a program imports
``anomalib.models`` or ``anomalib.data``, and only then, our own modules are imported right after it and register
themselves. It reads one environment variable: ``KD_MULTIRESOLUTION_AUTOLOAD=0`` (or ``false``, ``no``, ``off``)
switches it off. A fault in our package never breaks anomalib: it ends in one ``RuntimeWarning``.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False  # typing's own would have to be imported at every start of an interpreter
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

_IMPORTED_AFTER = {
    "anomalib.models": ("kd_multiresolution.paper.lightning_model", "kd_multiresolution.dual.lightning_model"),
    "anomalib.data": ("kd_multiresolution.data",),
}
_faults: set[str] = set()


def _import_ours(name: str) -> None:
    import importlib
    import warnings

    try:
        for ours in _IMPORTED_AFTER[name]:
            importlib.import_module(ours)
    except Exception as error:
        fault = f"kd_multiresolution could not be loaded, anomalib goes on without it: {type(error).__name__}: {error}"
        if fault not in _faults:  # Both imports fail alike when the whole package is broken.
            _faults.add(fault)
            warnings.warn(fault, RuntimeWarning, stacklevel=2)


class _AnomalibFinder:
    """Asks the other finders for the module, and has ours imported once it has been executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _IMPORTED_AFTER:
            return None
        for finder in sys.meta_path:
            find_spec = getattr(finder, "find_spec", None)
            if finder is self or find_spec is None:
                continue
            spec: ModuleSpec | None = find_spec(name, path, target)
            if spec is not None:
                return _followed_by_ours(spec)
        return None


def _followed_by_ours(spec: ModuleSpec) -> ModuleSpec:
    loader: Any = spec.loader
    if hasattr(loader, "exec_module"):
        exec_module = loader.exec_module

        def exec_and_import_ours(module: ModuleType) -> None:
            exec_module(module)
            _import_ours(spec.name)

        # On this loader alone: the class that all modules share stays as it is.
        loader.exec_module = exec_and_import_ours
    return spec


def install() -> None:
    """Put the finder in place, once, unless ``KD_MULTIRESOLUTION_AUTOLOAD`` switches it off."""
    if os.environ.get("KD_MULTIRESOLUTION_AUTOLOAD", "1").strip().lower() in ("0", "false", "no", "off"):
        return
    if any(type(finder).__name__ == _AnomalibFinder.__name__ for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _AnomalibFinder())
    for name in _IMPORTED_AFTER:
        if name in sys.modules:
            _import_ours(name)
