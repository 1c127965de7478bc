"""One training, evaluated after convergence in every way that its table asks for."""

from __future__ import annotations

import hashlib
import logging
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from anomalib.callbacks import ModelCheckpoint
from anomalib.data import InferenceBatch
from anomalib.engine import Engine
from anomalib.models.components import AnomalibModule
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import seed_everything
from torch import Tensor, nn
from torchvision.transforms.v2 import CenterCrop, Compose, InterpolationMode, Normalize, Resize, Transform

from kd_multiresolution import (
    EvaluationAfterConvergence,
    KdMultiresolution,
    KdMultiresolutionDual,
    KdMultiresolutionModel,
)
from kd_multiresolution.paper.anomaly_map import AnomalyMapGenerator
from kd_multiresolution.source.images import normalization_of
from kd_multiresolution.source.network import Source
from reporting import environment, in_a_line
from reproduction.data import data_module
from reproduction.settings import SCORES, Settings, View

logger = logging.getLogger(__name__)


class Attributions(nn.Module):
    """A model whose maps are attributions as they are, computed once for a batch, however often they are asked for.

    Args:
        model: the model; it loses what makes maps of attributions.
    """

    def __init__(self, model: KdMultiresolutionModel) -> None:
        super().__init__()
        self.model = model
        self.model.register_module("anomaly_map_generator", nn.Identity())
        self._last: tuple[Tensor, InferenceBatch] | None = None

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take the weights."""
        self.model.load_state_dict(state)
        self._last = None

    def forward(self, images: Tensor) -> InferenceBatch:
        """Return scores and attributions, (N, C, H, W)."""
        if self._last is not None and self._last[0] is images:
            return self._last[1]
        prediction: InferenceBatch = self.model(images)
        self._last = images, prediction
        return prediction


class Reading(nn.Module):
    """A trained model read in one way.

    Args:
        attributions: the model, whose maps are attributions as they are; shared by the views of one kind of map.
        view: the way.
    """

    def __init__(self, attributions: Attributions, view: View) -> None:
        super().__init__()
        self.attributions = attributions
        self.generator = AnomalyMapGenerator(view.sigma, percentile_scale=view.percentile_scale)

    def forward(self, images: Tensor) -> InferenceBatch:
        """Return scores and maps."""
        read: InferenceBatch = self.attributions(images)
        return read if read.anomaly_map is None else read._replace(anomaly_map=self.generator(read.anomaly_map))


class Kind(NamedTuple):
    """Arguments of the torch model that one kind of map has."""

    anomaly_map: str | None
    smooth_grad_as_published: bool

    @classmethod
    def of(cls, view: View) -> Kind:
        """Return a view's."""
        return cls(view.anomaly_map, view.as_published)


class ViewsAfterConvergence(EvaluationAfterConvergence):
    """Reads one training in several ways; the metrics' names begin with the view's.

    Args:
        views: the ways.
        arguments: those of the torch model, beside the kind of its map.
        evaluations: see :class:`EvaluationAfterConvergence`.
        interval: see there.
    """

    def __init__(self, views: tuple[View, ...], arguments: Mapping[str, Any], evaluations: int, interval: int) -> None:
        super().__init__(evaluations=evaluations, interval=interval)
        # The trained model itself is left alone: each kind of map has a copy, whose weights are brought up to date.
        self.copies = {
            kind: Attributions(KdMultiresolutionModel(**{**arguments, **kind._asdict(), "pretrained": False}))
            for kind in dict.fromkeys(map(Kind.of, views))
        }
        self.readings = {f"{view.name}/": Reading(self.copies[Kind.of(view)], view) for view in views}

    def models(self, pl_module: AnomalibModule) -> Mapping[str, nn.Module]:
        """Return a model per view, with the current weights."""
        state = pl_module.model.state_dict()
        for copy in self.copies.values():
            copy.load(state)
        return {prefix: reading.to(pl_module.device) for prefix, reading in self.readings.items()}


class EvaluationAtTheEnd(EvaluationAfterConvergence):
    """Evaluates the last epoch: the dual model's rate falls to zero with it, whenever the loss has converged."""

    def __init__(self) -> None:
        super().__init__(evaluations=1, window=sys.maxsize)

    def models(self, pl_module: AnomalibModule) -> Mapping[str, nn.Module]:
        """Return the model under the name of the one view that it is wanted for."""
        return {f"{SCORES.name}/": pl_module.model}


def fingerprint(source: Source) -> str:
    """Return the SHA-256 of the source's tensors, wherever they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(source.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def pre_processor(settings: Settings) -> PreProcessor | None:
    """Return CIFAR-10's pre-processor with its cut of the centre; everything else has the model's own."""
    if settings.resize is None:
        return None
    # The paper's Lanczos filter exists for files only, not for tensors; this is the nearest to it.
    resize = Resize(list(settings.resize), interpolation=InterpolationMode.BICUBIC)
    transforms: list[Transform] = [resize, CenterCrop(list(settings.image_size))]
    if settings.imagenet_normalization:
        mean, deviation = normalization_of(settings.source)
        transforms.append(Normalize(mean=mean, std=deviation))
    return PreProcessor(transform=Compose(transforms))


def state_file(settings: Settings, checkpoints: Path) -> Path:
    """Return the file of a training's state, from which it goes on if it is interrupted, whatever its weights' file."""
    return checkpoints / f"{replace(settings, weights=None).stem}.unfinished.ckpt"


def _epochs_of(state: Path) -> int:
    """Return after how many epochs a state was kept.

    Raises:
        RuntimeError: if it cannot be read; the message names it.
    """
    try:
        return int(torch.load(state, map_location="cpu", weights_only=True)["epoch"]) + 1
    except Exception as error:  # torch raises anything that a broken archive leads it to
        msg = f"{state}: no state to go on from. Move it away, and its training begins anew. ({in_a_line(error)})"
        raise RuntimeError(msg) from error


def _keeping(state: Path | None, interval: int) -> ModelCheckpoint:
    """Return what keeps a training's newest state, every ``interval`` epochs, or nothing."""
    if state is None:
        return ModelCheckpoint(save_top_k=0)
    return ModelCheckpoint(
        dirpath=state.parent,
        filename=state.stem,
        every_n_epochs=interval,
        save_on_train_epoch_end=True,
        enable_version_counter=False,  # one file, which is replaced
    )


def run(
    settings: Settings, weights: Path | None, root: Path | None, workers: int = 0, checkpoints: Path | None = None
) -> dict[str, Any]:
    """Train, evaluate, and return settings, environment and metrics as plain data.

    Args:
        settings: what is trained.
        weights: the source's weight file, ``None`` for the published weights of its name.
        root: the data set's folder, ``None`` for the data module's own default.
        workers: loader processes.
        checkpoints: folder in which the trained model is kept, under the name of the training's result. Until it is,
            the paper's model has its state of every :attr:`Settings.interval` epochs there, from which an interrupted
            training goes on.
    """
    seed_everything(settings.seed, workers=True, verbose=False)
    arguments: dict[str, Any] = {
        "source": settings.source,
        "source_weights": None if weights is None else str(weights),
        "pretrained": settings.pretrained,
        "critical_points": list(settings.critical_points),
        "seed": settings.seed,
    }
    components: dict[str, Any] = {"post_processor": False, "evaluator": False, "visualizer": False}
    if own := pre_processor(settings):
        components["pre_processor"] = own
    else:
        components |= {
            "image_size": settings.image_size,
            "imagenet_normalization": settings.imagenet_normalization,
        }
    model: AnomalibModule
    evaluation: EvaluationAfterConvergence
    if settings.model == "dual":
        model, evaluation = KdMultiresolutionDual(**arguments, **components), EvaluationAtTheEnd()
    else:
        arguments |= {
            "cloner": settings.cloner,
            "terms": settings.terms,
            "value_weight": settings.value_weight,
            "scale_channels": settings.scale_channels,
            "score_points": None if settings.score_points is None else list(settings.score_points),
        }
        # The model's own limit, too: Lightning's default number of epochs would be taken for no limit at all.
        model = KdMultiresolution(**arguments, **components, epochs=settings.epochs)
        evaluation = ViewsAfterConvergence(
            settings.views, {**arguments, "source_weights": None}, settings.evaluations, settings.interval
        )
    length: dict[str, Any] = {} if settings.epochs is None else {"max_epochs": settings.epochs}
    data = data_module(settings, root, workers)
    # The dual model's training takes minutes, and its checkpoints a calibration each.
    state = state_file(settings, checkpoints) if checkpoints is not None and settings.model == "paper" else None
    resumed_after = _epochs_of(state) if state is not None and state.exists() else None
    began = time.perf_counter()
    with TemporaryDirectory() as folder:
        engine = Engine(
            default_root_dir=folder,
            # Nothing else is kept but the figures, and nothing validated: nobody uses the threshold.
            callbacks=[evaluation, _keeping(state, settings.interval)],
            limit_val_batches=0,
            precision=settings.precision,
            devices=1,  # a step has as many images as the settings say
            enable_progress_bar=sys.stdout.isatty(),
            enable_model_summary=False,
            **length,
        )
        engine.fit(model, datamodule=data, ckpt_path=None if resumed_after is None else state)
        if checkpoints is not None:
            try:
                engine.trainer.save_checkpoint(checkpoints / f"{settings.stem}.ckpt", weights_only=True)
            except OSError:  # the figures are not lost for it
                logger.exception("The trained model of %s could not be written.", settings.stem)
    return {
        "settings": settings.as_json(),
        "environment": environment(),
        "images": {"train": len(data.train_data), "test": len(data.test_data)},
        "epochs": engine.trainer.current_epoch,
        "seconds": round(time.perf_counter() - began, 1),
        # Seconds and environment of a training that was interrupted are those since it went on.
        **({} if resumed_after is None else {"resumed_after": resumed_after}),
        **evaluation.summary,
    }
