"""An exported file held against the torch model that it was made from, on a few pictures.

A normalised score is squashed, and hides differences far from the threshold; pictures that are no parts of the user's
lie there. So scores are compared as they were before. By how much a runtime moves them is a share of their size; a
*deviation* says what that makes of a normalised score at the threshold.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor

from kd_multiresolution.plugin.post_processor import SMALLEST_SPAN, UnclampedPostProcessor

logger = logging.getLogger(__name__)

PICTURES = 4
BOUND = 0.002
"""Of the deviation: float32 in ONNX Runtime and OpenVINO stays below 0.0001, weights in float16 below 0.0012;
activations in bfloat16 begin at 0.012, weights in INT8 at 0.008 (docs/deployment.md)."""
LEAST_CORRELATION = 0.995  # of maps: float32 stays above 0.9999, weights in float16 above 0.999
AS_INFERENCERS = "OpenVINO, as anomalib's inferencers run it"
UNKNOWN_SIZE = (256, 256)
FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}
ROUNDING = 2.0**-22  # of a normalised score near 1

Array = npt.NDArray[np.float32]
Outputs = dict[str, npt.NDArray[Any]]
Run = Callable[[Array], Outputs]


def check_pictures(size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Return coloured rings and stripes of all widths, (4, 3, H, W).

    Integers alone, so that every program makes the same ones.

    Args:
        size: height and width in pixels.
    """
    height, width = size
    row, column = np.arange(height)[:, None], np.arange(width)[None]
    down, right = row - height // 2, column - width // 2
    pictures = [
        [
            (down**2 * (number + 1 + colour) + right**2 * (2 * number + 3 - colour)) // (height // 2 + 17 * number + 1)
            + row * number * colour
            for colour in range(3)
        ]
        for number in range(PICTURES)
    ]
    return (np.array(pictures) % 256).astype(np.uint8)


def checked(
    model: AnomalibModule, file: Path, input_size: tuple[int, int] | None, images: Sequence[Array] = ()
) -> dict[str, Any] | None:
    """Return how far an exported file is from its model; ``None``, and a warning, if nothing is installed to run it.

    Args:
        model: what was exported.
        file: ``.pt``, ``.onnx`` or ``.xml``.
        input_size: height and width in pixels of the images that it takes alone; ``None``: any.
        images: more images, beside :func:`check_pictures`, (1, 3, H, W) in [0, 1].

    Raises:
        RuntimeError: if the file cannot be run.
    """
    region = cast("Any", model).source.region
    size = input_size or model.input_size or (UNKNOWN_SIZE if region is None else region.shape[-2:])
    # A torch file is the same program: it is run, not measured, and SmoothGrad takes a hundred passes.
    count = 1 if file.suffix == ".pt" else PICTURES
    shown = [*check_pictures((size[0], size[1]))[:count, None].astype(np.float32) / 255, *images]
    expected = [in_torch(model, image) for image in shown]
    try:
        outputs = {name: [run(image) for image in shown] for name, run in runtimes(file).items()}
    except Exception as error:
        msg = f"{file} cannot be run: {error}"
        raise RuntimeError(msg) from error
    if not outputs:
        logger.warning("%s was not held against the model: nothing here runs it. pip install onnxruntime.", file)
        return None
    return {
        "pictures": {"count": count, "size": [*size], "and_training_images": len(images)},
        "scores_in_torch": [one["pred_score"].item() for one in expected],
        "bounds": {"deviation": BOUND, "least_correlation": LEAST_CORRELATION},
        "runtimes": {name: compared(model, found, expected) for name, found in outputs.items()},
    }


def is_within_bounds(found: dict[str, Any]) -> bool:
    """Return whether what :func:`compared` gives is within the bounds."""
    correlation = found["least_correlation"]
    return bool(found["deviation"] <= BOUND and (correlation is None or correlation >= LEAST_CORRELATION))


def runtimes(file: Path) -> dict[str, Run]:
    """Return what runs an exported file on this machine, by name: in float32 first, then as anomalib's inferencers."""
    if file.suffix == ".pt":
        return {"torch": _torch_file(file)}
    if file.suffix == ".onnx" and find_spec("onnxruntime"):
        return {"ONNX Runtime": _onnx_runtime(file)}
    if find_spec("openvino"):
        float32 = {"OpenVINO, float32": open_vino(file, FLOAT32)}
        return {**float32, AS_INFERENCERS: open_vino(file, {})}
    return {}


def in_torch(model: AnomalibModule, images: Array) -> Outputs:
    """Return a model's outputs by name, computed where a file is run: a GPU may compute in fewer digits."""
    was_training, device = model.training, model.device
    model.eval().cpu()
    try:
        with torch.no_grad():
            outputs = model(torch.from_numpy(images))._asdict()
    finally:
        model.train(was_training).to(device)
    return {name: output.numpy() for name, output in outputs.items() if output is not None}


def compared(model: AnomalibModule, ours: Sequence[Outputs], expected: Sequence[Outputs]) -> dict[str, Any]:
    """Return how far outputs are from torch's: *deviation* of scores, and the least correlation of a map.

    Args:
        model: whose outputs they are; its post-processor says what the scores were before they were normalised.
        ours: a file's, of one image each.
        expected: torch's, of the same images.
    """
    scores, reference = (np.array([one["pred_score"].item() for one in part]) for part in (ours, expected))
    correlations = [
        _correlation(mine["anomaly_map"].ravel(), theirs["anomaly_map"].ravel())
        for mine, theirs in zip(ours, expected, strict=True)
        if "anomaly_map" in theirs
    ]
    return {
        "scores": scores.tolist(),
        "deviation": _deviation(model, scores, reference),
        "least_correlation": min(correlations, default=None),
    }


def _deviation(model: AnomalibModule, scores: npt.NDArray[np.float64], expected: npt.NDArray[np.float64]) -> float:
    if not np.isfinite(scores).all():
        return float("inf")
    post_processor = cast("PostProcessor | None", model.post_processor)
    if post_processor is None or not post_processor.enable_normalization or bool(post_processor.image_min.isnan()):
        # Raw: a share of the score.
        return float(np.max(np.abs(scores - expected) / np.maximum(np.abs(expected), SMALLEST_SPAN)))
    if not isinstance(post_processor, UnclampedPostProcessor):
        return float(np.abs(scores - expected).max())
    least, largest = float(post_processor.image_min), float(post_processor.image_max)
    threshold, span = float(post_processor.image_threshold), largest - least
    if math.isnan(threshold):  # as the normalisation takes it
        threshold = (least + largest) / 2
    if span <= SMALLEST_SPAN:
        return float(np.abs(scores - expected).max())
    raw, reference = (threshold + span / 2 * unbounded(2 * part - 1) for part in (scores, expected))
    # What the last digit of a normalised score stands for grows towards 0 and 1.
    room = 2 * ROUNDING * span / 2 * (1 + np.abs(unbounded(2 * expected - 1))) ** 2
    moved = np.maximum(np.abs(raw - reference) - room, 0) / np.maximum(np.abs(reference), SMALLEST_SPAN)
    return float(moved.max() * max(abs(threshold), span) / span)


def unbounded(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return what :func:`~kd_multiresolution.plugin.post_processor.bounded` makes x of."""
    room: npt.NDArray[np.float64] = np.maximum(1 - np.abs(x), np.finfo(np.float32).eps / 4)
    return x / room


def _correlation(mine: npt.NDArray[Any], theirs: npt.NDArray[Any]) -> float:
    if not np.isfinite(mine).all():
        return -1.0
    if np.ptp(theirs) == 0 or np.ptp(mine) == 0:  # a flat one, of a picture without anything
        return float(np.allclose(mine, theirs, rtol=1e-3, atol=1e-6))
    return float(np.corrcoef(mine, theirs)[0, 1])


def _torch_file(file: Path) -> Run:
    # Written by this process a moment ago; a model that was on another device still thinks it is there.
    loaded = torch.load(file, map_location="cpu", weights_only=False)["model"].cpu()
    return lambda images: in_torch(loaded, images)


def _onnx_runtime(file: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names, (given,) = [output.name for output in session.get_outputs()], session.get_inputs()
    return lambda images: dict(zip(names, session.run(None, {given.name: images}), strict=True))


def open_vino(model: Any, config: dict[str, str]) -> Run:
    """Return what runs a file, or an ``openvino.Model``, with a configuration of OpenVINO's."""
    compiled = open_vino_core().compile_model(str(model) if isinstance(model, Path) else model, "CPU", config)
    return lambda images: {key.get_any_name(): output for key, output in compiled(images).to_dict().items()}


@cache
def open_vino_core() -> Any:
    """Return OpenVINO's core, one for as long as the process lives.

    Its processor plugin puts a signal stack in place, and puts back the one before when the core is given up. Of two
    cores the first can be given up first: the second then puts back a stack that is gone, and the next signal, such as
    the end of a data loader's worker, ends the process.
    """
    import openvino

    return openvino.Core()
