"""What an exported model says about itself: a JSON file beside it, from which a program can tell how to use it."""

from __future__ import annotations

import hashlib
import json
import math
import platform
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, cast

import torch
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import MEBinPostProcessor, PostProcessor
from torchvision.transforms.v2 import CenterCrop, Compose, InterpolationMode, Normalize, Resize

from kd_multiresolution.plugin.post_processor import FalseAlarmPostProcessor, UnclampedPostProcessor
from kd_multiresolution.plugin.tiling import described

FORMAT = 1  # to be raised with every change after which programs that read it have to change
PACKAGES = (
    "kd-multiresolution", "anomalib", "torch", "torchvision", "timm", "onnx", "onnxscript", "onnxruntime", "openvino",
    "nncf",
)  # fmt: skip
PRECISION = (
    "The score is a small difference of large activations: half precision moves it (float16, and bfloat16, which "
    "OpenVINO takes by itself where a processor has it)."
)


def note_file(file: Path) -> Path:
    """Return where the note of an exported model lies: ``model.json`` for ``model.onnx``."""
    return file.with_suffix(".json")


def write_note(
    model: AnomalibModule,
    file: Path,
    *,
    input_size: tuple[int, int] | None,
    compression: str | None,
    check: dict[str, Any] | None,
) -> None:
    """Write the note of an exported model beside it.

    Args:
        model: what was exported.
        file: the exported model, ``.pt``, ``.onnx`` or ``.xml``.
        input_size: height and width in pixels that it takes alone; ``None``: any.
        compression: how its weights or operations were made smaller; ``None``: not at all.
        check: what came out when it was held against the model; ``None``: it could not be.
    """
    source = cast("Any", model.model).source
    size_of_mask = cast("Any", model).region_size
    note = {
        "format": FORMAT,
        "model": model.name,
        "file": {
            "name": file.name,
            "compression": compression,
            "sha256": {part.name: hashlib.sha256(part.read_bytes()).hexdigest() for part in parts(file)},
        },
        "input": {
            "layout": "NCHW",
            "colours": "RGB",
            "range": [0, 1],
            "size": None if input_size is None else [*input_size],
        },
        # Of the files that a mask of what is judged was drawn on: others are not what it is made for.
        "region": None if size_of_mask is None else {"file_size": [*size_of_mask]},
        "preparation": {"by": "the model itself", "steps": [*_steps(_prepares(model))]},
        "tiles": described(getattr(model.model, "tiler", None)),
        "score": _scale(model, "image"),
        "map": None if getattr(model.model, "anomaly_map", "") is None else _scale(model, "pixel"),
        "precision": {"needs": "float32", "why": PRECISION},
        "source": {
            "name": source.name,
            "weights": source.weights,
            "sha256_of_tensors": digest(source.state_dict()),
            "critical_points": [*source.critical_points],
        },
        "versions": {"python": platform.python_version(), **versions()},
        "check": check,
    }
    note_file(file).write_text(json.dumps(note, indent=2) + "\n")


def parts(file: Path) -> list[Path]:
    """Return the files that an exported model consists of: weights can lie beside it."""
    beside = {".onnx": [file.with_name(f"{file.name}.data")], ".xml": [file.with_suffix(".bin")]}
    return [file, *(part for part in beside.get(file.suffix, []) if part.is_file())]


def digest(state: dict[str, Any]) -> str:
    """Return the SHA-256 of tensors: of name, type, shape and bytes of each, in the order of their names."""
    found = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        if isinstance(tensor, torch.Tensor):
            plain = tensor.detach().cpu().contiguous()
            found.update(f"{name} {plain.dtype} {[*plain.shape]} ".encode())
            found.update(plain.flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of those packages that are installed and have a part in an export."""
    there = {(distribution.metadata["Name"] or "").lower(): distribution.version for distribution in distributions()}
    return {name: there[name] for name in PACKAGES if name in there}


def _prepares(model: AnomalibModule) -> object:
    return getattr(model.pre_processor, "export_transform", None)


def _steps(transform: object) -> Iterator[dict[str, Any]]:
    """Yield what an exported model does to its images before it looks at them."""
    match transform:
        case None:
            return
        case Compose():
            for step in transform.transforms:
                yield from _steps(step)
        case Resize():
            yield {
                "step": "resize",
                "size": [*transform.size],
                "interpolation": InterpolationMode(transform.interpolation).value,
                "antialias": bool(transform.antialias),
            }
        case Normalize():
            yield {"step": "normalize", "mean": [*transform.mean], "deviation": [*transform.std]}
        case CenterCrop():
            yield {"step": "centre crop", "size": [*transform.size]}
        case _:
            name = type(transform).__name__
            size = getattr(transform, "size", None)
            yield {"step": name, **({} if size is None else {"size": [*size]})}


def _scale(model: AnomalibModule, kind: str) -> dict[str, Any]:
    """Return what the numbers of a score (``image``) or a map (``pixel``) mean."""
    post_processor = model.post_processor
    if not isinstance(post_processor, PostProcessor):
        return {
            "normalized": False,
            "squashed": False,
            "range": [0, None],
            "threshold": None,
            "meaning": "raw: there is no threshold",
        }
    fitted = {
        name: _number(getattr(post_processor, attribute))
        for name, attribute in {
            "threshold": f"_{kind}_threshold", "least": f"{kind}_min", "largest": f"{kind}_max",
        }.items()
    }  # fmt: skip
    normalized = post_processor.enable_normalization and None not in (fitted["least"], fitted["largest"])
    threshold = (
        _number(getattr(post_processor, f"normalized_{kind}_threshold")) if post_processor.enable_thresholding else None
    )
    known = fitted["threshold"] is not None or not isinstance(post_processor, UnclampedPostProcessor)
    return {
        "normalized": normalized,
        "squashed": normalized and isinstance(post_processor, UnclampedPostProcessor),
        "range": [0, 1] if normalized else [0, None],
        "threshold": threshold if known else None,
        "meaning": _meaning(post_processor, kind, normalized=normalized, known=known),
        "raw": fitted,
    }


def _meaning(post_processor: PostProcessor, kind: str, *, normalized: bool, known: bool) -> str:
    if not known:
        return "raw: there is no threshold"
    match post_processor:
        case FalseAlarmPostProcessor():
            of = {"image": "score", "pixel": "highest value of a map"}[kind]
            where = f"the {of} that {100 * post_processor.rate:g} % of normal images exceed, told from held-out ones"
        case MEBinPostProcessor() if kind == "pixel":
            return "masks have a threshold of their own in each image (MEBinPostProcessor)"
        case _:
            where = "the threshold that was fitted to validation images"
    if not normalized:
        return f"raw; the threshold is {where}"
    squashed = "no score reaches 0 or 1" if isinstance(post_processor, UnclampedPostProcessor) else "clamped to [0, 1]"
    return f"0.5 is {where}; {squashed}"


def _number(buffer: torch.Tensor) -> float | None:
    number = float(buffer)
    return None if math.isnan(number) else number
