"""Run an exported model on images with ONNX Runtime or OpenVINO alone: no torch, no anomalib, none of our code.

anomalib export --model kd_multiresolution --ckpt_path model.ckpt --export_type onnx --export_root exported
python benchmarks/run_exported.py exported/weights/onnx/model.onnx picture.png --output heat_maps

Prints score and label of each image, and writes its heat map, if the model gives one, as a grey picture. The label is
the model's own, by the threshold that its post-processor had. A model that knew none gives no label; --threshold says
from which score on an image is anomalous. Its heat map is raw and ends at its own maximum, unless --white says where.
The script needs numpy and Pillow beside the runtime.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

Array = npt.NDArray[np.float32]
Model = Callable[[Array], dict[str, Array]]
Size = tuple[int, int] | None


def load(file: Path) -> tuple[Model, Size]:
    """Return a function from images, (N, 3, H, W) in [0, 1], to the model's outputs by name, and the size it takes.

    The size, (H, W), is None where the model was exported without one: then it takes images of any size.
    """
    if file.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        height, width = session.get_inputs()[0].shape[2:]  # names where they are dynamic
        size = (height, width) if isinstance(height, int) else None
        return lambda images: dict(zip(names, session.run(None, {"input": images}), strict=True)), size
    import openvino

    # Where a processor has bfloat16, OpenVINO computes in it unless it is told not to: 8 bits are too few for
    # differences of nearly equal activations.
    compiled = openvino.Core().compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    shape = compiled.input(0).partial_shape
    size = (shape[2].get_length(), shape[3].get_length()) if shape[2].is_static else None
    return lambda images: {key.get_any_name(): output for key, output in compiled(images).to_dict().items()}, size


def read(file: Path) -> Array:
    """Return an image as the model takes it, (1, 3, H, W) in [0, 1].

    Raises:
        ValueError: if the file does not hold one picture of eight bits per channel. Pillow would make one of it.
    """
    with Image.open(file) as image:
        bits = max(getattr(image, "tag_v2", {}).get(258, (8,)))  # of a TIFF; of a PNG the decoder is told
        deep = bits > 8 or image.mode.startswith(("I", "F")) or (image.format == "PNG" and ";16" in str(image.tile))
        # Behind a phone's JPEG stands a preview: MPO.
        several = getattr(image, "is_animated", False) and image.format != "MPO"
        if deep or several or image.format not in {"BMP", "JPEG", "MPO", "PNG", "TIFF", "WEBP"}:
            msg = "expected one picture of eight bits per channel, as BMP, JPEG, PNG, TIFF or WebP"
            raise ValueError(msg)
        pixels = np.asarray(image.convert("RGB"), np.float32) / 255
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)[None])


def is_anomalous(outputs: dict[str, Array], threshold: float | None) -> bool | None:
    """Return the label that the model gave, or that of a threshold where it gave none; ``None`` if there is neither."""
    if "pred_label" in outputs:
        return bool(outputs["pred_label"].item())
    return None if threshold is None else bool(outputs["pred_score"].item() > threshold)


def grey(outputs: dict[str, Array], white: float | None) -> npt.NDArray[np.uint8]:
    """Return the heat map of one image, (H, W).

    Args:
        outputs: of the model.
        white: the value that is white; ``None``: 1, the end of normalised maps, or the map's own maximum where the
            model gave no mask, so that its map is raw.
    """
    heat_map = outputs["anomaly_map"].squeeze()
    if white is None:
        white = 1.0 if "pred_mask" in outputs else max(float(heat_map.max()), float(np.finfo(np.float32).tiny))
    return np.asarray((heat_map / white).clip(0, 1) * 255, np.uint8)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help=".onnx or .xml file; the .onnx.data or .bin file lies beside it")
    parser.add_argument("images", type=Path, nargs="+", help="image files")
    parser.add_argument("--output", type=Path, required=True, help="folder of the heat maps")
    parser.add_argument("--threshold", type=float, help="of scores, for a model that gives no labels")
    parser.add_argument("--white", type=float, help="value of the heat map that is white, above 0")
    arguments = parser.parse_args()
    if arguments.white is not None and not arguments.white > 0:
        parser.error(f"--white {arguments.white}: expected a number above 0")
    for file in (arguments.model, *arguments.images):
        if not file.is_file():
            parser.error(f"{file}: no such file")
    if arguments.model.suffix not in {".onnx", ".xml"}:
        parser.error(f"{arguments.model}: expected an .onnx or .xml file")
    model, size = load(arguments.model)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for file in arguments.images:
        try:
            image = read(file)
        except ValueError as error:
            parser.error(f"{file}: {error}.")
        if size not in {None, image.shape[2:]}:
            height, width = image.shape[2:]
            parser.error(
                f"{file}: {height} x {width} pixels, but the model takes {size[0]} x {size[1]} alone. Resize the "
                "image, or export the model without --input_size."
            )
        outputs = model(image)
        if "pred_label" in outputs and arguments.threshold is not None:
            parser.error(f"--threshold {arguments.threshold}: {arguments.model} gives labels of its own. Leave it out.")
        label = is_anomalous(outputs, arguments.threshold)
        print(f"{file}: score {outputs['pred_score'].item():.4f}{'' if label is None else f', anomalous {label}'}")
        if "anomaly_map" in outputs:
            # Images of the same name may lie in different folders, one per kind of defect.
            target = arguments.output / f"{file.resolve().parent.name}_{file.stem}.png"
            Image.fromarray(grey(outputs, arguments.white)).save(target)
