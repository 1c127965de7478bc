"""What follows every export: the file is held against the model, and a note is written beside it."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path

from anomalib.models.components import AnomalibModule

from kd_multiresolution.plugin.export_check import (
    AS_INFERENCERS,
    BOUND,
    LEAST_CORRELATION,
    Array,
    checked,
    is_within_bounds,
)
from kd_multiresolution.plugin.export_note import note_file, parts, write_note

logger = logging.getLogger(__name__)


def explained(
    model: AnomalibModule,
    file: Path,
    *,
    input_size: tuple[int, int] | None = None,
    compression: str | None = None,
    images: Sequence[Array] = (),
    has_own_shapes: bool = False,
) -> Path:
    """Return an exported file, with a note beside it, after it was held against the model.

    Args:
        model: what was exported.
        file: ``.pt``, ``.onnx`` or ``.xml``.
        input_size: height and width in pixels of the images that the file takes alone; ``None``: any.
        compression: how it was made smaller; ``None``: not at all. What is lost by it is the user's choice, and warned
            of.
        images: more images to hold it against the model on, (1, 3, H, W) in [0, 1].
        has_own_shapes: whether the user said which shapes it takes, so that it may not take an image alone.

    Raises:
        RuntimeError: if the file cannot be run; or gives scores that are not finite, or, without compression, other
            scores or maps than the model. The latter is deleted.
    """
    note_file(file).unlink(missing_ok=True)  # of an earlier export
    if has_own_shapes:
        logger.warning("%s has shapes of its own, and was not held against the model.", file)
    check = None if has_own_shapes else checked(model, file, input_size, images)
    beyond = {
        name: found for name, found in (check or {"runtimes": {}})["runtimes"].items() if not is_within_bounds(found)
    }
    for name, found in beyond.items():
        correlation = found["least_correlation"]
        maps = "" if correlation is None else f", maps correlate by {correlation:.4f} or more"
        said = (
            f"{file}, {name}: a score at the threshold moves by up to {found['deviation']:.2g}{maps} (bounds: {BOUND}, "
            f"{LEAST_CORRELATION})."
        )
        if math.isinf(found["deviation"]) or (compression is None and name != AS_INFERENCERS):
            for part in parts(file):
                part.unlink()
            msg = f"{said} The file is not the model, and was deleted: export in another form."
            raise RuntimeError(msg)
        why = f"compression_type={compression} costs it" if compression else "load it with INFERENCE_PRECISION_HINT=f32"
        logger.warning("%s %s.", said, why)
    write_note(model, file, input_size=input_size, compression=compression, check=check)
    return file
