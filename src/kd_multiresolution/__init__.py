"""Multiresolution Knowledge Distillation for Anomaly Detection (Salehi et al., CVPR 2021) as an anomalib plugin.

The classes are imported when they are first used, since what anomalib brings along takes seconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kd_multiresolution.dual.lightning_model import KdMultiresolutionDual, kd_multiresolution_dual
    from kd_multiresolution.line.threshold import set_threshold
    from kd_multiresolution.paper.anomaly_map import AnomalyMapGenerator
    from kd_multiresolution.paper.cloner import Cloner
    from kd_multiresolution.paper.discrepancy import discrepancy
    from kd_multiresolution.paper.lightning_model import KdMultiresolution, kd_multiresolution
    from kd_multiresolution.paper.torch_model import KdMultiresolutionModel
    from kd_multiresolution.plugin.compiled import CompiledEvaluation
    from kd_multiresolution.results.protocol import EvaluationAfterConvergence
    from kd_multiresolution.results.visualizer import FrameVisualizer, ThresholdVisualizer
    from kd_multiresolution.training.convergence import ConvergenceStopping

__version__ = "0.1.0"

__all__ = [
    "AnomalyMapGenerator",
    "Cloner",
    "CompiledEvaluation",
    "ConvergenceStopping",
    "EvaluationAfterConvergence",
    "FrameVisualizer",
    "KdMultiresolution",
    "KdMultiresolutionDual",
    "KdMultiresolutionModel",
    "ThresholdVisualizer",
    "discrepancy",
    "kd_multiresolution",
    "kd_multiresolution_dual",
    "set_threshold",
]

_MODULES = {
    "AnomalyMapGenerator": "paper.anomaly_map",
    "Cloner": "paper.cloner",
    "CompiledEvaluation": "plugin.compiled",
    "ConvergenceStopping": "training.convergence",
    "EvaluationAfterConvergence": "results.protocol",
    "FrameVisualizer": "results.visualizer",
    "KdMultiresolution": "paper.lightning_model",
    "KdMultiresolutionDual": "dual.lightning_model",
    "KdMultiresolutionModel": "paper.torch_model",
    "ThresholdVisualizer": "results.visualizer",
    "discrepancy": "paper.discrepancy",
    "kd_multiresolution": "paper.lightning_model",
    "kd_multiresolution_dual": "dual.lightning_model",
    "set_threshold": "line.threshold",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
