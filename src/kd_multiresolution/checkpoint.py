"""What a checkpoint says about itself, so that a model that does not fit it is refused in words.

The source's weights are part of the checkpoint, although they are most of it: it needs nothing else then, and no other
file can be taken for the original.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from anomalib.models.components import AnomalibModule

from kd_multiresolution import __version__
from kd_multiresolution.post_processor import FALSE_ALARM_RATE, FalseAlarmPostProcessor

KEY = "kd_multiresolution"
FORMATS = {"paper": 3, "dual": 4}
"""Of each variant's checkpoints; to be raised with every change after which older versions cannot read new ones."""

OLDEST_DUAL_FORMAT = 4
"""The oldest that the dual variant can still read; it had other layers and maps before."""

ARGUMENTS = ("source", "variant", "cloner", "cloner_bias", "cloner_batch_norm")  # what decides the tensors' shapes
# What decides the scores and maps that thresholds were fitted to.
SCORING = ("terms", "value_weight", "score_points", "anomaly_map", "attribution_path", "sigma", "percentile_scale")
# What decides the dual variant's scores and thresholds in training, with its value where it was not given.
CALIBRATION = {"image_score": "auto", "false_alarm_rate": FALSE_ALARM_RATE}

logger = logging.getLogger(__name__)


def describe(model: AnomalibModule, critical_points: tuple[str, ...]) -> dict[str, Any]:
    """Return the entry that a checkpoint gets.

    Args:
        model: the Lightning module.
        critical_points: the source's, in place of the argument, which may be the default.
    """
    built = {name: model.hparams[name] for name in ARGUMENTS}
    return {
        "format": FORMATS[built["variant"]],
        "version": __version__,
        "built": {**built, "critical_points": list(critical_points)},
        "scoring": _scoring(model),
        "calibration": _calibration(model),
        "images": _images(model),
    }


def _images(model: AnomalibModule) -> dict[str, Any]:
    """Return what decides the pre-processor, which a model has from its checkpoint."""
    size = model.hparams["image_size"]
    sides = [size, size] if isinstance(size, int) else None if size is None else list(size)
    return {"image_size": sides, "imagenet_normalization": model.hparams["imagenet_normalization"]}


def _scoring(model: AnomalibModule) -> dict[str, Any]:
    settings = {name: model.hparams[name] for name in SCORING}
    points = getattr(model.model, "score_points", None)  # the argument may be the default; the dual variant has none
    return {**settings, "score_points": None if points is None else list(points)}


def _calibration(model: AnomalibModule) -> dict[str, Any]:
    return {name: model.hparams[name] for name in CALIBRATION}


def warn_of_other_images(checkpoint: Mapping[str, Any], model: AnomalibModule) -> None:
    """Say in the log which arguments of a model give way to a checkpoint's pre-processor.

    Args:
        checkpoint: what was read.
        model: the Lightning module.
    """
    ours, theirs = _images(model), (checkpoint.get(KEY) or {}).get("images", {})
    # An argument that was not given asks for nothing.
    unheeded = [name for name in theirs if ours[name] not in (None, theirs[name])]
    if unheeded:
        logger.warning(
            "%s: not heeded, images are prepared as in the checkpoint's training.",
            ", ".join(f"{name}={ours[name]!r}" for name in unheeded),
        )


def warn_of_other_scores(checkpoint: Mapping[str, Any], model: AnomalibModule) -> None:
    """Say in the log if a model's scores or maps are not those that a checkpoint's thresholds were fitted to.

    Args:
        checkpoint: what was read.
        model: the Lightning module, with a post-processor.
    """
    ours, theirs = _scoring(model), (checkpoint.get(KEY) or {}).get("scoring", {})
    differing = [name for name in theirs if ours[name] != theirs[name]]
    if differing:
        # The dual variant's come from its training.
        trained = isinstance(model.post_processor, FalseAlarmPostProcessor)
        logger.warning(
            "The thresholds of this checkpoint were fitted with %s, the model has %s: labels and masks are wrong until "
            "it is %s.",
            *(", ".join(f"{name}={scoring[name]!r}" for name in differing) for scoring in (theirs, ours)),
            "trained anew" if trained else "validated anew (anomalib validate, Engine.validate)",
        )


def warn_of_other_calibration(checkpoint: Mapping[str, Any], model: AnomalibModule) -> None:
    """Say in the log which arguments of a model give way to what was found in a checkpoint's training.

    Args:
        checkpoint: what was read.
        model: the Lightning module.
    """
    ours, theirs = _calibration(model), (checkpoint.get(KEY) or {}).get("calibration", {})
    # An argument that was not given asks for nothing.
    unheeded = [name for name in theirs if ours[name] not in (CALIBRATION[name], theirs[name])]
    if unheeded:
        logger.warning(
            "%s: not heeded, images are judged as this checkpoint's training has found (%s). Train anew.",
            *(", ".join(f"{name}={given[name]!r}" for name in unheeded) for given in (ours, theirs)),
        )


def check_checkpoint(checkpoint: Mapping[str, Any], model: AnomalibModule, critical_points: tuple[str, ...]) -> None:
    """Check that a model can be loaded from a checkpoint.

    Args:
        checkpoint: what was read.
        model: the Lightning module.
        critical_points: the source's.

    Raises:
        ValueError: if it is another model's, a newer version's, the dual variant's of an earlier format, or was built
            with other arguments.
    """
    theirs = checkpoint.get(KEY)
    if theirs is None:
        # Another model's, or written before checkpoints had an entry.
        if not any(name.startswith("model.source.") for name in checkpoint["state_dict"]):
            msg = "This is not a checkpoint of KdMultiresolution: it holds no source."
            raise ValueError(msg)
        return
    if theirs["format"] > FORMATS.get(theirs["built"]["variant"], 0):
        msg = (
            f"This checkpoint was written by a later state of kd_multiresolution ({theirs['version']}) than this one "
            f"({__version__}), which cannot read it: install that one."
        )
        raise ValueError(msg)
    ours = describe(model, critical_points)["built"]
    if theirs["built"]["variant"] == "dual" and theirs["format"] < OLDEST_DUAL_FORMAT:
        msg = (
            f"This checkpoint of variant='dual' was written by an earlier state of kd_multiresolution "
            f"{theirs['version']}, whose layers and maps were others: train it again, or go on with that state."
        )
        raise ValueError(msg)
    differing = [name for name in ours if ours[name] != theirs["built"][name]]
    if differing:
        trained, given = (
            ", ".join(f"{name}={built[name]!r}" for name in differing) for built in (theirs["built"], ours)
        )
        msg = (
            f"This checkpoint was trained with {trained}; the model was built with {given}. Give it the arguments of "
            "the training, or use KdMultiresolution.load_from_checkpoint(path), which knows them."
        )
        raise ValueError(msg)
