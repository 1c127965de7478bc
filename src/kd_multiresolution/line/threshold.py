"""Sets a trained model's thresholds again, from fresh images and without training, into a new checkpoint."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from anomalib.data import InferenceBatch
from anomalib.post_processing import PostProcessor
from torch import Tensor

import kd_multiresolution
from kd_multiresolution.line.change import NAMES, Decisions, ThresholdChange
from kd_multiresolution.line.choice import Costs, allowed_by_rate, cheapest, expected_rate, with_above
from kd_multiresolution.line.scoring import RawScores, raw_scores
from kd_multiresolution.plugin.arguments import check_positive, check_types
from kd_multiresolution.plugin.checkpoint import KEY, MODELS_BY_VARIANT
from kd_multiresolution.plugin.learnt import FRESH, LearntNormals, distribution
from kd_multiresolution.plugin.module import PluginModule
from kd_multiresolution.plugin.post_processor import SENSITIVITY, renew_thresholds
from kd_multiresolution.results.changes import FEWEST

FROM_IMAGES = "The threshold was set again, from images that the model has not learnt from"
GIVEN = "The threshold was set again, to a number that was given"


def set_threshold(
    checkpoint: str | Path,
    output: str | Path,
    good: str | Path | None = None,
    defective: str | Path | None = None,
    threshold: float | None = None,
    false_alarm_rate: float | None = None,
    false_alarms: int | None = None,
    miss_cost: float | None = None,
    false_alarm_cost: float | None = None,
    defect_share: float | None = None,
) -> ThresholdChange:
    """Set the thresholds of a trained model again, without training, and write a new checkpoint.

    Ask for a rate of false alarms, or for a number of them among the good images, or give the costs of both mistakes,
    or the threshold itself. As many good images get a marked pixel as are called defective; without images the
    threshold of pixels stays. Weights stay as they are, and so does the length of normalised scores' scale.

    Args:
        checkpoint: file of a trained model, which stays as it is.
        output: file of the new checkpoint, which must not exist.
        good: folder of good images that the model has not learnt from. A threshold that is given needs none.
        defective: folder of defective images. They only decide together with costs.
        threshold: the raw score above which an image is to be called defective, such as ``report.html`` shows it.
        false_alarm_rate: fraction of good images that may be called defective, above 0 and below 0.5. A rate of 1 in n
            takes n - 1 good images.
        false_alarms: how many of these good images may be called defective.
        miss_cost: what a defective image costs that is called good; with ``false_alarm_cost`` and ``defective``.
        false_alarm_cost: what a good image costs that is called defective.
        defect_share: fraction of defective images among those to come, for the costs. Default: as among these images.

    Returns:
        What has changed, in numbers, and as a string in words.

    Raises:
        TypeError: if an argument has another type.
        ValueError: if the images cannot give what is asked for, or a file is not what it should be.
    """
    given = dict(locals())
    origin = FROM_IMAGES if threshold is None else GIVEN
    check_types(set_threshold, given)
    _check_rule(given)
    source, target = Path(checkpoint), Path(output)
    stored = _stored(source)
    _check_output(target)
    model = _model(stored, source)
    post_processor = cast("PostProcessor", model.post_processor)
    if not post_processor.enable_thresholding:
        msg = f"checkpoint={str(source)!r}: with enable_thresholding=False its post-processor calls nothing defective."
        raise ValueError(msg)
    model.post_processor = None  # raw scores
    learnt, model.learnt = model.learnt, LearntNormals()  # these images need not be like those that were learnt
    fine = raw_scores(model, good, "good") if good is not None else RawScores()
    bad = raw_scores(model, defective, "defective") if defective is not None else RawScores()
    model.post_processor, model.learnt = post_processor, learnt
    before = _decisions(post_processor, fine, bad)

    count, costs, expected, bound = len(fine.scores), None, None, None
    if false_alarm_cost is not None:
        costs = Costs(cast("float", miss_cost), false_alarm_cost, defect_share)
        threshold = cheapest(costs, fine.of_images, bad.of_images)
    if threshold is not None:
        allowed = min(int((fine.of_images > threshold).sum()), count - 1)
    else:
        allowed = _allowed(false_alarm_rate, false_alarms, count)
        threshold = with_above(fine.of_images, allowed)
        expected, bound = expected_rate(allowed, count)
    notes = _set(post_processor, "image", threshold, [*fine.scores, *bad.scores])
    if fine.peaks:
        notes += _set(post_processor, "pixel", with_above(fine.of_maps, allowed), [*fine.peaks, *bad.peaks])
    if 0 < count < FEWEST:
        notes += (f"{count} good images are too few to hold later ones against: those known before stay.",)
    after = _decisions(post_processor, fine, bad)
    change = ThresholdChange(
        before=before,
        after=after,
        good=count,
        defective=len(bad.scores),
        expected=expected,
        bound=bound,
        cost=_cost(costs, before, after, count, len(bad.scores)) if costs else None,
        scale=_normalised(post_processor, before.thresholds["image"]),
        notes=notes,
        checkpoint=target,
    )
    _write(stored, model, fine, origin, target)
    return change


def _check_rule(given: Mapping[str, Any]) -> None:
    """Raise a ``ValueError`` unless one rule is asked for, as a whole."""
    costs = ("miss_cost", "false_alarm_cost")
    rules = [name for name in ("threshold", "false_alarm_rate", "false_alarms") if given[name] is not None]
    named = [name for name in costs if given[name] is not None]
    if len(rules) + bool(named) != 1:
        asked = ", ".join([*rules, *named]) or "none"
        msg = (
            f"{asked} given: expected one of threshold, false_alarm_rate, false_alarms, or both miss_cost and "
            "false_alarm_cost."
        )
        raise ValueError(msg)
    if (exact := given["threshold"]) is not None and not math.isfinite(exact):
        msg = f"threshold={exact!r}: expected a raw score, which is finite."
        raise ValueError(msg)
    if exact is None and given["good"] is None:
        msg = f"{', '.join([*rules, *named])}: takes a folder of good images (good); threshold alone takes none."
        raise ValueError(msg)
    for name in named:
        check_positive(name, given[name])
    if named and (len(named) < 2 or given["defective"] is None):
        msg = f"{' and '.join(named)}: costs take miss_cost, false_alarm_cost and a folder of defective images."
        raise ValueError(msg)
    share = given["defect_share"]
    if share is not None and not (named and 0 < share < 1):
        msg = f"defect_share={share!r}: expected a fraction above 0 and below 1, together with costs."
        raise ValueError(msg)


def _allowed(rate: float | None, false_alarms: int | None, count: int) -> int:
    if rate is not None:
        return allowed_by_rate(rate, count)
    number = cast("int", false_alarms)
    if not 0 <= number < count:
        msg = f"false_alarms={number!r}: expected a number of these {count} good images, 0 to {count - 1}."
        raise ValueError(msg)
    return number


def _stored(path: Path) -> dict[str, Any]:
    if not path.is_file():
        msg = f"checkpoint={str(path)!r}: there is no such file."
        raise ValueError(msg)
    try:
        stored: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        entry, tensors = stored[KEY], stored["state_dict"]
    except Exception as error:
        msg = f"checkpoint={str(path)!r}: not a checkpoint of kd_multiresolution that can be read ({error})."
        raise ValueError(msg) from error
    if not (isinstance(entry, dict) and isinstance(entry.get("built"), dict)):
        msg = f"checkpoint={str(path)!r}: it does not say what its model was built with. Give one of a training."
        raise ValueError(msg)
    name = _model_of(entry)
    kind = getattr(kd_multiresolution, name, None)
    if not (isinstance(kind, type) and issubclass(kind, PluginModule)):
        msg = (
            f"checkpoint={str(path)!r}: of the model {name!r}, which this state of kd_multiresolution does not know. "
            "Install the one that trained it."
        )
        raise ValueError(msg)
    if "post_processor._image_threshold" not in tensors:
        msg = (
            f"checkpoint={str(path)!r}: its model has no post-processor with a threshold, so its scores are raw and "
            "nothing is called defective. Train without post_processor=False."
        )
        raise ValueError(msg)
    return stored


def _check_output(path: Path) -> None:
    wrong = ""
    if path.exists():
        wrong = "it exists, and no file is written over"
    elif not path.parent.is_dir():
        wrong = "its folder does not exist"
    elif not os.access(path.parent, os.W_OK):
        wrong = "its folder cannot be written to"
    if wrong:
        msg = f"output={str(path)!r}: {wrong}. Name a new file in a folder that there is, and that you may write to."
        raise ValueError(msg)


def _model_of(entry: Mapping[str, Any]) -> str:
    """Return the name of the model that a checkpoint's entry is of."""
    before = MODELS_BY_VARIANT.get(entry["built"].get("variant"), "KdMultiresolution")
    return str(entry.get("model") or before)


def _model(stored: Mapping[str, Any], path: Path) -> Any:
    kind = getattr(kd_multiresolution, _model_of(stored[KEY]))
    try:
        return kind.load_from_checkpoint(path, map_location="cpu", visualizer=False)
    except (RuntimeError, KeyError) as error:
        msg = f"checkpoint={str(path)!r}: its tensors are not those of {kind.__name__} ({error}). Is it damaged?"
        raise ValueError(msg) from error


def _decisions(post_processor: PostProcessor, good: RawScores, defective: RawScores) -> Decisions:
    """Return what the post-processor itself says of the images."""
    alarms, marked = _said(post_processor, good)
    said, _ = _said(post_processor, defective)
    thresholds = {kind: float(getattr(post_processor, f"{kind}_threshold")) for kind in NAMES}
    if not good.peaks:
        del thresholds["pixel"]
    misses = len(defective.scores) - sum(said)
    return Decisions(thresholds, sum(alarms), misses, None if not good.peaks else sum(marked))


def _said(post_processor: PostProcessor, found: RawScores) -> tuple[list[bool], list[bool]]:
    maps = torch.tensor(found.peaks).reshape(-1, 1, 1, 1) if found.peaks else None
    labelled = post_processor(InferenceBatch(pred_score=torch.tensor(found.scores), anomaly_map=maps))
    # Without a threshold nothing is called defective.
    return tuple([] if part is None else part.flatten().tolist() for part in (labelled.pred_label, labelled.pred_mask))


def _set(post_processor: PostProcessor, kind: str, threshold: float, scores: list[float]) -> tuple[str, ...]:
    """Set a threshold, and return what else had to change for it to be what decides."""
    getattr(post_processor, f"_{kind}_threshold").fill_(threshold)
    least, largest = (getattr(post_processor, f"{kind}_{end}") for end in ("min", "max"))
    # No validation had given the scale of normalised scores a length.
    if post_processor.enable_normalization and not (largest - least).isfinite():
        if not scores:
            msg = (
                f"threshold={threshold!r}: no image has given this checkpoint's normalised scores a scale. Give good "
                "images as well (good)."
            )
            raise ValueError(msg)
        least.fill_(min(scores))
        largest.fill_(max(scores))
    name = f"{kind}_sensitivity"
    if (sensitivity := getattr(post_processor, name)) == SENSITIVITY:
        return ()
    setattr(post_processor, name, SENSITIVITY)
    return (f"{name} was {sensitivity}, which moves the decision, and is {SENSITIVITY} now.",)


def _cost(costs: Costs, before: Decisions, after: Decisions, good: int, defective: int) -> tuple[float, float]:
    paid = [costs.per_image(said.alarms, said.misses, good, defective) for said in (before, after)]
    return paid[0], paid[1]


def _normalised(post_processor: PostProcessor, threshold: float) -> float | None:
    if not post_processor.enable_normalization or threshold != threshold:
        return None
    batch = post_processor(InferenceBatch(pred_score=torch.tensor([threshold])))
    return float(cast("Tensor", batch.pred_score))


def _write(stored: dict[str, Any], model: Any, good: RawScores, origin: str, path: Path) -> None:
    renew_thresholds(stored, model.post_processor)
    # A post-processor of the user's own has settings beside ours.
    own = stored.get("anomalib_post_processor_config") or {}
    stored["anomalib_post_processor_config"] = {**own, **model.post_processor.checkpoint_config()}
    stored[KEY] = {**stored[KEY], "threshold_origin": origin}
    if len(good.scores) >= FEWEST:
        pictures = {name: distribution(values) for name, values in good.pictures.items()}
        learnt = replace(model.learnt, origin=FRESH, scores=distribution(good.scores), pictures=pictures)
        stored[KEY] = {**stored[KEY], "learnt": learnt.entry()}
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        torch.save(stored, unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
