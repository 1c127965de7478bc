"""The models that are compared, each as its authors or anomalib set it up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from anomalib.models import EfficientAd, Padim, Patchcore, Stfpm
from anomalib.models.components import AnomalibModule
from anomalib.pre_processing import PreProcessor

from comparison.trial import Trial
from kd_multiresolution import KdMultiresolution, KdMultiresolutionDual
from kd_multiresolution.paper.presets import BATCH_SIZE

# Figures come from raw scores, and nobody's time holds drawing of pictures.
WITHOUT_COMPONENTS: dict[str, Any] = {"post_processor": False, "evaluator": False, "visualizer": False}


@dataclass(frozen=True)
class Candidate:
    """A model, as it is compared."""

    label: str  # its name in tables
    build: Callable[[Trial], AnomalibModule]  # makes it for a trial
    batch_size: int = 32  # images per training step, where nothing else is asked for
    epochs: int | None = None  # the same; `None`: its own rule
    layers: tuple[str, ...] | None = None  # the backbone's feature levels, where not all that were asked for
    backbone: str | None = None  # its own, where it has not the one of all
    validates: bool = False  # whether its training ends with a look at held-out normal images


def same_images(trial: Trial) -> PreProcessor:
    """Return the pre-processor of all models on the shared backbone."""
    size = (trial.image_size, trial.image_size)
    return KdMultiresolution.configure_pre_processor(size, imagenet_normalization=True, source=trial.backbone)


def _ours(kind: type[KdMultiresolution | KdMultiresolutionDual], **arguments: Any) -> Callable[[Trial], AnomalibModule]:
    def build(trial: Trial) -> AnomalibModule:
        return kind(
            source=trial.backbone, critical_points=list(trial.layers), image_size=trial.image_size,
            imagenet_normalization=True, epochs=trial.epochs, seed=trial.seed, **arguments, **WITHOUT_COMPONENTS,
        )  # fmt: skip

    return build


def _published(trial: Trial) -> AnomalibModule:
    # As in the paper: the map is the gradient's, images are not normalised.
    return KdMultiresolution(
        source=trial.backbone, critical_points=list(trial.layers), image_size=trial.image_size, epochs=trial.epochs,
        seed=trial.seed, **WITHOUT_COMPONENTS,
    )  # fmt: skip


def _stfpm(trial: Trial) -> AnomalibModule:
    return Stfpm(trial.backbone, trial.layers, pre_processor=same_images(trial), **WITHOUT_COMPONENTS)


def _padim(trial: Trial) -> AnomalibModule:
    return Padim(trial.backbone, list(trial.layers), pre_processor=same_images(trial), **WITHOUT_COMPONENTS)


def _patchcore(trial: Trial) -> AnomalibModule:
    return Patchcore(
        trial.backbone, trial.layers, coreset_sampling_ratio=trial.coreset_ratio,
        pre_processor=same_images(trial), **WITHOUT_COMPONENTS,
    )  # fmt: skip


def _efficient_ad(trial: Trial) -> AnomalibModule:
    pre_processor = EfficientAd.configure_pre_processor((trial.image_size, trial.image_size))
    return EfficientAd(str(trial.imagenette), pre_processor=pre_processor, **WITHOUT_COMPONENTS)


CANDIDATES = {
    "published": Candidate(
        "ours, paper (VGG-16, gradient map)",
        _published,
        batch_size=BATCH_SIZE,
        layers=("pool2", "pool3", "pool4", "pool5"),
        backbone="vgg16.tv_in1k",
    ),
    "paper": Candidate(
        "ours, paper (discrepancy map)", _ours(KdMultiresolution, anomaly_map="discrepancy"), batch_size=16
    ),
    "dual": Candidate("ours, dual", _ours(KdMultiresolutionDual), batch_size=16),
    "stfpm": Candidate("STFPM", _stfpm, epochs=100),  # its authors' number
    "padim": Candidate("PaDiM", _padim, epochs=1),
    # Its authors' levels and anomalib's. The first one has four times as many positions as the second, for each of
    # which the memory bank is searched.
    "patchcore": Candidate("PatchCore", _patchcore, epochs=1, layers=("layer2", "layer3")),
    "efficient_ad": Candidate("EfficientAD-S", _efficient_ad, batch_size=1, epochs=300, validates=True),
}
LABELS = {name: candidate.label for name, candidate in CANDIDATES.items()}
