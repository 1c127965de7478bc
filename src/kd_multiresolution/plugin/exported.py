"""Exports as anomalib does them; the file is then held against the model, and a note is written beside it."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anomalib.data import AnomalibDataModule
from anomalib.deploy import CompressionType
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
from kd_multiresolution.plugin.full_precision import ask_for_float32
from kd_multiresolution.plugin.post_processor import UnclampedPostProcessor
from kd_multiresolution.plugin.quantization import quantize_source, training_images

if TYPE_CHECKING:
    Base = AnomalibModule
else:
    Base = object  # anomalib's registry takes every direct subclass of AnomalibModule for a model

SHAPES = {"dynamic_axes", "dynamic_shapes"}

logger = logging.getLogger(__name__)


class ExplainedExport(Base):
    """A mixin, to stand before ``AnomalibModule``: its exports; the torch model is ``model``."""

    _is_on_the_way = False

    def to_torch(self, *args: Any, **kwargs: Any) -> Path:
        """Export as anomalib does, with a note beside the file, and hold the file against the model."""
        return explained(self, super().to_torch(*args, **kwargs))

    def to_onnx(  # type: ignore[override]
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Export as :meth:`to_torch`.

        Raises:
            ValueError: if the model has a tiler.
            RuntimeError: if the file does not give the model's scores and maps.
        """
        if self.model.tiler is not None:
            msg = "A model with a tiler is exported to torch alone (export_type=torch): a graph cuts no tiles."
            raise ValueError(msg)
        if isinstance(self.post_processor, UnclampedPostProcessor):
            self.post_processor.note_thresholds()
        # anomalib's default is 14, from which the exporter comes back to 18 with a page of errors.
        kwargs.setdefault("opset_version", 18)
        own = not SHAPES.isdisjoint(kwargs)
        file = super().to_onnx(export_root, model_file_name, input_size, **kwargs)
        # On the way to OpenVINO it lies in a folder that vanishes.
        return file if self._is_on_the_way else explained(self, file, input_size=input_size, has_own_shapes=own)

    def to_openvino(  # type: ignore[override]
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        compression_type: CompressionType | None = None,
        datamodule: AnomalibDataModule | None = None,
        **kwargs: Any,
    ) -> Path:
        """Export as :meth:`to_onnx`, to a file whose operations ask for float32; warn if compression costs much."""
        self._is_on_the_way = True
        try:
            file: Path = super().to_openvino(
                export_root, model_file_name, input_size, compression_type, datamodule, **kwargs
            )
        finally:
            self._is_on_the_way = False
        ask_for_float32(file)
        calibrates = compression_type in {CompressionType.INT8_PTQ, CompressionType.INT8_ACQ}
        images = training_images(datamodule, input_size) if calibrates and datamodule is not None else []
        explained(
            self,
            file,
            input_size=input_size,
            compression=compression_type and compression_type.value,
            images=images,
            has_own_shapes=bool(kwargs.get("ov_kwargs")) or not SHAPES.isdisjoint(kwargs.get("onnx_kwargs") or {}),
        )
        logger.warning(
            "OpenVINO computes in bfloat16 on processors that have it, which can flip labels near the threshold. The "
            "operations of %s ask for float32, but not all are heard, and by versions before 2026 none: load it with "
            "INFERENCE_PRECISION_HINT=f32, and try it where it will run (examples/run_exported.py --check).",
            file,
        )
        return file

    def _compress_ov_model(
        self,
        model: Any,
        compression_type: CompressionType | None = None,
        datamodule: AnomalibDataModule | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Compress as anomalib does; INT8_PTQ is for what of the source stands it, and never for cloners and maps."""
        if compression_type == CompressionType.INT8_PTQ:
            return quantize_source(model, datamodule, self)
        return super()._compress_ov_model(model, compression_type, datamodule, *args, **kwargs)


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
