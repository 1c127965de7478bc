"""What a checkpoint says about itself, so that a model that does not fit it is refused in words.

The source's weights are part of the checkpoint, although they are most of it: it needs nothing else then, and no other
file can be taken for the original.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from anomalib.models.components import AnomalibModule

from kd_multiresolution import __version__

KEY = "kd_multiresolution"
# Checkpoints named no model while there was one, in two variants.
MODELS_BY_VARIANT = {"paper": "KdMultiresolution", "dual": "KdMultiresolutionDual"}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CheckpointEntry:
    """Which of a model's arguments its checkpoints keep, and what they are compared for.

    Attributes:
        model: name of the model's class.
        format: to be raised with every change after which older versions cannot read new checkpoints.
        oldest_format: the oldest that this version can read.
        built: arguments that decide the tensors' shapes, beside the critical points.
        built_before: those of them that older checkpoints do not name, with the values these were trained with.
            (A value that older versions cannot build needs no new format: it leaves tensors over, which torch refuses.)
        scoring: those that decide the scores and maps that thresholds were fitted to.
        calibration: those that decide scores and thresholds in training, with their values where they were not given.
        remedy: what gives a model with other scores its thresholds.
    """

    model: str
    format: int
    oldest_format: int
    built: tuple[str, ...]
    built_before: Mapping[str, Any]
    scoring: tuple[str, ...]
    calibration: Mapping[str, Any]
    remedy: str

    def describe(self, module: AnomalibModule) -> dict[str, Any]:
        """Return the entry that a checkpoint of a Lightning module gets."""
        return {
            "model": self.model,
            "format": self.format,
            "version": __version__,
            "built": self._built(module),
            "scoring": self._scoring(module),
            "calibration": {name: module.hparams[name] for name in self.calibration},
            "images": _images(module),
        }

    def check(self, checkpoint: Mapping[str, Any], module: AnomalibModule) -> None:
        """Check that a Lightning module can be loaded from a checkpoint.

        Args:
            checkpoint: what was read.
            module: what is loaded.

        Raises:
            ValueError: if it is another model's, a newer or too old a version's, or was built with other arguments.
        """
        theirs = checkpoint.get(KEY)
        if theirs is None:
            # Another model's, or written before checkpoints had an entry.
            if not any(name.startswith("model.source.") for name in checkpoint["state_dict"]):
                msg = f"This is not a checkpoint of {self.model}: it holds no source."
                raise ValueError(msg)
            return
        variant = theirs["built"].get("variant")
        model = theirs.get("model") or MODELS_BY_VARIANT.get(variant or "paper", "another model")
        if model != self.model:
            said = f"variant={variant!r}" if variant else f"model {model}"
            msg = f"This checkpoint says {said}: load it with {model}, not with {self.model}."
            raise ValueError(msg)
        if theirs["format"] > self.format:
            msg = (
                f"This checkpoint was written by a later state of kd_multiresolution ({theirs['version']}) than this "
                f"one ({__version__}), which cannot read it: install that one."
            )
            raise ValueError(msg)
        if theirs["format"] < self.oldest_format:
            msg = (
                f"This checkpoint of {self.model} was written by an earlier state of kd_multiresolution "
                f"{theirs['version']}, whose layers and maps were others: train it again, or go on with that state."
            )
            raise ValueError(msg)
        ours = self._built(module)
        trained_with = {**ours, **self.built_before, **theirs["built"]}
        differing = [name for name in ours if ours[name] != trained_with[name]]
        if differing:
            trained, given = (_named(built, differing) for built in (trained_with, ours))
            msg = (
                f"This checkpoint was trained with {trained}; the model was built with {given}. Give it the arguments "
                f"of the training, or use {self.model}.load_from_checkpoint(path), which knows them."
            )
            raise ValueError(msg)

    def warn_of_other_images(self, checkpoint: Mapping[str, Any], module: AnomalibModule) -> None:
        """Say in the log which arguments of a module give way to a checkpoint's pre-processor."""
        ours, theirs = _images(module), _entry(checkpoint, "images")
        # An argument that was not given asks for nothing.
        unheeded = [name for name in ours if name in theirs and ours[name] not in (None, theirs[name])]
        if unheeded:
            logger.warning(
                "%s: not heeded, images are prepared as in the checkpoint's training.", _named(ours, unheeded)
            )

    def warn_of_other_scores(self, checkpoint: Mapping[str, Any], module: AnomalibModule) -> None:
        """Say in the log if a module's scores or maps are not those that a checkpoint's thresholds were fitted to."""
        ours, theirs = self._scoring(module), _entry(checkpoint, "scoring")
        differing = [name for name in ours if name in theirs and ours[name] != theirs[name]]
        if differing:
            logger.warning(
                "The thresholds of this checkpoint were fitted with %s, the model has %s: labels and masks are wrong "
                "until it is %s.",
                _named(theirs, differing),
                _named(ours, differing),
                self.remedy,
            )

    def warn_of_other_calibration(self, checkpoint: Mapping[str, Any], module: AnomalibModule) -> None:
        """Say in the log which arguments of a module give way to what was found in a checkpoint's training."""
        theirs = _entry(checkpoint, "calibration")
        ours = {name: module.hparams[name] for name in self.calibration}
        # An argument that was not given asks for nothing.
        unheeded = [
            name for name in ours if name in theirs and ours[name] not in (self.calibration[name], theirs[name])
        ]
        if unheeded:
            logger.warning(
                "%s: not heeded, images are judged as this checkpoint's training has found (%s). Train anew.",
                _named(ours, unheeded),
                _named(theirs, unheeded),
            )

    def _built(self, module: AnomalibModule) -> dict[str, Any]:
        # The source's critical points, in place of the argument, which may be the default.
        points = list(cast("Any", module.model).source.critical_points)
        return {**{name: module.hparams[name] for name in self.built}, "critical_points": points}

    def _scoring(self, module: AnomalibModule) -> dict[str, Any]:
        settings = {name: module.hparams[name] for name in self.scoring}
        if "score_points" in settings:
            settings["score_points"] = list(cast("Any", module.model).score_points)  # the argument may be the default
        return settings


def check_variant(variant: str | None, model: str) -> None:
    """Check what an old configuration or checkpoint still says, and name the model that it means.

    Args:
        variant: the argument that there was; ``None``: nothing was said.
        model: name of the model that was given it.

    Raises:
        ValueError: if it means another model.
    """
    meant = MODELS_BY_VARIANT.get(variant or "", "KdMultiresolution or KdMultiresolutionDual")
    sentence = f"variant={variant!r} is no argument any more: use the model {meant}."
    if variant is not None and meant != model:
        raise ValueError(sentence)
    if variant is not None:
        logger.warning(sentence)


def _images(module: AnomalibModule) -> dict[str, Any]:
    """Return what decides the pre-processor, which a model has from its checkpoint."""
    size = module.hparams["image_size"]
    sides = [size, size] if isinstance(size, int) else None if size is None else list(size)
    return {"image_size": sides, "imagenet_normalization": module.hparams["imagenet_normalization"]}


def _entry(checkpoint: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    entry: Mapping[str, Any] = (checkpoint.get(KEY) or {}).get(part, {})
    return entry


def _named(settings: Mapping[str, Any], names: list[str]) -> str:
    return ", ".join(f"{name}={settings[name]!r}" for name in names)
