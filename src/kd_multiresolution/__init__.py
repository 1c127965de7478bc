"""Multiresolution Knowledge Distillation for Anomaly Detection (Salehi et al., CVPR 2021) as an anomalib plugin.

The classes are imported when they are first used, since what anomalib brings along takes seconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Not lazy: the function has the name of its module, and must be bound after the module is.
from kd_multiresolution.discrepancy import discrepancy

if TYPE_CHECKING:
    from kd_multiresolution.anomaly_map import AnomalyMapGenerator
    from kd_multiresolution.cloner import Cloner
    from kd_multiresolution.convergence import ConvergenceStopping
    from kd_multiresolution.lightning_model import KdMultiresolution, kd_multiresolution
    from kd_multiresolution.protocol import EvaluationAfterConvergence
    from kd_multiresolution.torch_model import KdMultiresolutionModel
    from kd_multiresolution.visualizer import ThresholdVisualizer

__version__ = "0.1.0"

__all__ = [
    "AnomalyMapGenerator",
    "Cloner",
    "ConvergenceStopping",
    "EvaluationAfterConvergence",
    "KdMultiresolution",
    "KdMultiresolutionModel",
    "ThresholdVisualizer",
    "discrepancy",
    "kd_multiresolution",
]

_MODULES = {
    "AnomalyMapGenerator": "anomaly_map",
    "Cloner": "cloner",
    "ConvergenceStopping": "convergence",
    "EvaluationAfterConvergence": "protocol",
    "KdMultiresolution": "lightning_model",
    "KdMultiresolutionModel": "torch_model",
    "ThresholdVisualizer": "visualizer",
    "kd_multiresolution": "lightning_model",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
