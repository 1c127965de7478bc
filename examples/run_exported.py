"""Judge pictures with an exported model: ONNX Runtime or OpenVINO, numpy and Pillow, nothing else.

anomalib export --model kd_multiresolution --model.pretrained false --ckpt_path model.ckpt --export_type onnx \
    --export_root exported
python examples/run_exported.py exported/weights/onnx/model.onnx picture.png --output judged

Prints score, decision and boxes of each picture. Into the folder it writes the heat map and the mask of each, as large
as the picture, and judged.json with all of it. What the numbers mean stands in model.json, which every export leaves
beside the model. --check tells whether the model gives on this machine what it gave where it was exported.

Start from here: read, Exported and boxes are what a program of your own needs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

Array = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Box = tuple[int, int, int, int]
Region = tuple[float, float, float, float]
FORMAT = 1  # of the notes that this program reads
WHOLE: Region = (0.0, 0.0, 1.0, 1.0)
SMALLEST = 1e-30
ROUNDING = 2.0**-22  # of a score near 1
BROKEN = (ValueError, OSError, SyntaxError, Image.DecompressionBombError)  # what Pillow makes of damaged files


class Exported:
    """An exported model and the note beside it.

    Args:
        file: ``.onnx`` or ``.xml``; ``.onnx.data`` or ``.bin`` and ``.json`` lie beside it.

    Raises:
        ValueError: if the note is missing, of another file, or of a format that this program does not know.
    """

    def __init__(self, file: Path) -> None:
        beside = file.with_suffix(".json")
        if not beside.is_file():
            msg = f"{beside}: no such file. The export writes it beside the model; both are needed."
            raise ValueError(msg)
        self.note: dict[str, Any] = json.loads(beside.read_text())
        if self.note.get("format") != FORMAT:
            msg = f"{beside}: format {self.note.get('format')}, but this program reads format {FORMAT}."
            raise ValueError(msg)
        for name, expected in self.note["file"]["sha256"].items():
            part = file.with_name(name)
            if not part.is_file() or hashlib.sha256(part.read_bytes()).hexdigest() != expected:
                msg = f"{part} is not the file that {beside} was written with. Copy all files of an export together."
                raise ValueError(msg)
        size = self.note["input"]["size"]
        self.size: tuple[int, int] | None = None if size is None else (size[0], size[1])
        self.run = load(file)

    def __call__(self, image: Array) -> dict[str, Array]:
        """Return the model's outputs by name.

        Args:
            image: (1, 3, H, W), RGB, in [0, 1]; the model itself resizes and normalises it.

        Raises:
            ValueError: if the model takes images of another size alone.
        """
        height, width = image.shape[2:]
        if self.size not in {None, (height, width)}:
            msg = (
                f"{height} x {width} pixels, but the model takes {self.size[0]} x {self.size[1]} alone. Resize the "
                "image, or export the model without --input_size"
            )
            raise ValueError(msg)
        return self.run(image)

    def is_anomalous(self, outputs: dict[str, Array], threshold: float | None = None) -> bool | None:
        """Return the decision; ``None`` if there is no threshold.

        Args:
            outputs: of one image.
            threshold: score above which it is; ``None``: the model's own.
        """
        if threshold is None and "pred_label" in outputs:
            return bool(outputs["pred_label"].item())
        threshold = self.note["score"]["threshold"] if threshold is None else threshold
        return None if threshold is None else bool(outputs["pred_score"].item() > threshold)

    def region(self) -> Region | None:
        """Return the part of a picture that its map covers: top, left, bottom, right as shares of height and width.

        ``None`` if that cannot be told from the note.
        """
        region, size = WHOLE, self.size
        for step in self.note["preparation"]["steps"]:
            if step["step"] == "normalize":
                continue
            new = step.get("size") or []
            if step["step"] == "resize" and len(new) == 2:
                size = (new[0], new[1])
            elif "crop" in step["step"].lower() and size and len(new) == 2 and region == WHOLE:
                down, right = ((1 - min(part / whole, 1)) / 2 for part, whole in zip(new, size, strict=True))
                region, size = (down, right, 1 - down, 1 - right), (new[0], new[1])
            else:
                return None
        return region


def load(file: Path) -> Callable[[Array], dict[str, Array]]:
    """Return a function from images, (N, 3, H, W) in [0, 1], to the model's outputs by name."""
    if file.suffix == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        given = session.get_inputs()[0].name
        return lambda images: dict(zip(names, session.run(None, {given: images}), strict=True))
    import openvino

    # Where a processor has bfloat16, OpenVINO computes in it unless it is told not to: 8 bits are too few for
    # differences of nearly equal activations.
    compiled = openvino.Core().compile_model(str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda images: {key.get_any_name(): output for key, output in compiled(images).to_dict().items()}


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


def spread(values: npt.NDArray[np.uint8], size: tuple[int, int], region: Region, *, smooth: bool) -> Image.Image:
    """Return a map or a mask as large as its picture, black where the model did not look.

    Args:
        values: (H, W).
        size: height and width of the picture in pixels.
        region: the part that the values cover, as :meth:`Exported.region` says.
        smooth: interpolate between values.
    """
    height, width = size
    top, left, bottom, right = (round(share * side) for share, side in zip(region, (height, width) * 2, strict=True))
    how = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
    picture = Image.new("L", (width, height))
    picture.paste(Image.fromarray(values).resize((right - left, bottom - top), how), (left, top))
    return picture


def boxes(mask: Mask) -> list[Box]:
    """Return a box round each connected part of a mask, (H, W): left, top, right, bottom; right and bottom are outside.

    Pixels that touch at a corner are connected.
    """
    left = mask.copy()
    found = []
    while left.any():
        start = divmod(int(left.argmax()), left.shape[1])
        left[start] = False
        waiting, rows, columns = [start], [start[0]], [start[1]]
        while waiting:
            row, column = waiting.pop()
            top, first = max(row - 1, 0), max(column - 1, 0)
            around = left[top : row + 2, first : column + 2]
            near = [(top + int(r), first + int(c)) for r, c in np.argwhere(around)]
            around[:] = False
            waiting += near
            rows += [r for r, _ in near]
            columns += [c for _, c in near]
        found.append((min(columns), min(rows), max(columns) + 1, max(rows) + 1))
    return found


def grey(heat_map: Array, white: float | None) -> npt.NDArray[np.uint8]:
    """Return a heat map, (H, W), as a grey picture.

    Args:
        heat_map: of one image.
        white: the value that is white; ``None``: the map's own maximum.
    """
    white = max(float(heat_map.max()), float(np.finfo(np.float32).tiny)) if white is None else white
    return np.asarray((heat_map / white).clip(0, 1) * 255, np.uint8)


def names(files: Sequence[Path]) -> list[str]:
    """Return names for what is written of pictures: folder and file, and a number behind it where two would share it.

    Images of the same name may lie in different folders, one per kind of defect.
    """
    found: dict[str, str] = {}  # some file systems do not tell small letters from capitals
    for file in files:
        plain = f"{file.resolve().parent.name}_{file.stem}"
        tries = chain([plain], (f"{plain}_{number}" for number in count(2)))
        name = next(name for name in tries if name.casefold() not in found)
        found[name.casefold()] = name
    return [*found.values()]


def judged(
    model: Exported, file: Path, folder: Path, threshold: float | None = None, name: str | None = None
) -> dict[str, Any]:
    """Return score, decision and boxes of a picture, and write its heat map and its mask into a folder.

    Args:
        model: what judges.
        file: the picture.
        folder: for ``<name>_map.png`` and ``<name>_mask.png``.
        threshold: score above which it is anomalous; ``None``: the model's own.
        name: see :func:`names`; ``None``: that of a single picture.
    """
    image = read(file)
    judges = model.note.get("region")
    if judges is not None and [*image.shape[2:]] != judges["file_size"]:
        drawn_on = " x ".join(map(str, judges["file_size"]))
        msg = f"{image.shape[2]} x {image.shape[3]} pixels, but the mask of what is judged was drawn on {drawn_on}"
        raise ValueError(msg)
    outputs = model(image)
    found: dict[str, Any] = {
        "file": str(file),
        "score": outputs["pred_score"].item(),
        "anomalous": model.is_anomalous(outputs, threshold),
        "boxes": None,
        "map": None,
        "mask": None,
    }
    if "anomaly_map" not in outputs:
        return found
    region, size = model.region(), (image.shape[2], image.shape[3])
    if region is None:  # what the map covers of the picture is not known
        region, size = WHOLE, (outputs["anomaly_map"].shape[-2], outputs["anomaly_map"].shape[-1])
        found["pixels"] = "of the map: what it covers of the picture does not follow from the note"
    name = name or names([file])[0]
    of_map = model.note["map"]
    found["map"] = f"{name}_map.png"
    pixels = grey(outputs["anomaly_map"].squeeze(), 1.0 if of_map["normalized"] else None)
    spread(pixels, size, region, smooth=True).save(folder / found["map"])
    if "pred_mask" in outputs:
        marked = spread(outputs["pred_mask"].squeeze().astype(np.uint8) * 255, size, region, smooth=False)
        found["mask"] = f"{name}_mask.png"
        marked.save(folder / found["mask"])
        found["boxes"] = boxes(np.asarray(marked) > 0)
    return found


def check_pictures(size: tuple[int, int], count: int) -> npt.NDArray[np.uint8]:
    """Return the pictures that an export is checked on, (N, 3, H, W): coloured rings and stripes, integers alone."""
    height, width = size
    row, column = np.arange(height)[:, None], np.arange(width)[None]
    down, right = row - height // 2, column - width // 2
    pictures = [
        [
            (down**2 * (number + 1 + colour) + right**2 * (2 * number + 3 - colour)) // (height // 2 + 17 * number + 1)
            + row * number * colour
            for colour in range(3)
        ]
        for number in range(count)
    ]
    return (np.array(pictures) % 256).astype(np.uint8)


def deviation(model: Exported) -> float | None:
    """Return by how much a score at the threshold moves here; ``None``: not known.

    It is held against torch's at the export; a compressed file's, against what it gave there itself.
    """
    kept, scale = model.note["check"], model.note["score"]
    if kept is None:
        return None
    pictures = check_pictures(tuple(kept["pictures"]["size"]), kept["pictures"]["count"]).astype(np.float32) / 255
    ours = np.array([model.run(picture[None])["pred_score"].item() for picture in pictures])
    compressed = model.note["file"]["compression"] is not None
    there = next(iter(kept["runtimes"].values()))["scores"] if compressed else kept["scores_in_torch"]
    expected = np.array(there[: len(ours)])
    if not scale["normalized"]:
        return float(np.max(np.abs(ours - expected) / np.maximum(np.abs(expected), SMALLEST)))
    least, largest, threshold = (scale["raw"][name] for name in ("least", "largest", "threshold"))
    span = largest - least
    if not scale["squashed"] or span <= SMALLEST:
        return float(np.abs(ours - expected).max())
    threshold = (least + largest) / 2 if threshold is None else threshold
    # These pictures are no parts: their scores lie close to 1, where differences are small and the last digit is large.
    room = ROUNDING * span * (1 + np.abs(unbounded(2 * expected - 1))) ** 2
    raw, reference = (threshold + span / 2 * unbounded(2 * scores - 1) for scores in (ours, expected))
    moved = np.maximum(np.abs(raw - reference) - room, 0) / np.maximum(np.abs(reference), SMALLEST)
    return float(moved.max() * max(abs(threshold), span) / span)


def unbounded(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return what was squashed to between -1 and 1."""
    room: npt.NDArray[np.float64] = np.maximum(1 - np.abs(x), np.finfo(np.float32).eps / 4)
    return x / room


def main() -> None:
    """Judge the pictures of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help=".onnx or .xml file; .onnx.data or .bin, and .json, lie beside it")
    parser.add_argument("images", type=Path, nargs="*", help="image files")
    parser.add_argument("--output", type=Path, help="folder of heat maps, masks and judged.json")
    parser.add_argument("--threshold", type=float, help="score above which an image is anomalous; default: the model's")
    parser.add_argument("--check", action="store_true", help="hold the model against what it gave at the export")
    arguments = parser.parse_args()
    if arguments.images and arguments.output is None:
        parser.error("--output: say into which folder")
    if not (arguments.images or arguments.check):
        parser.error("expected images, or --check")
    for file in (arguments.model, *arguments.images):
        if not file.is_file():
            parser.error(f"{file}: no such file")
    if arguments.model.suffix not in {".onnx", ".xml"}:
        parser.error(f"{arguments.model}: expected an .onnx or .xml file")
    try:
        model = Exported(arguments.model)
    except ValueError as error:
        parser.error(str(error))
    if arguments.check:
        moved = deviation(model)
        print("nothing was kept to check with" if moved is None else f"a score at the threshold moves by {moved:.6f}")
        if moved is None or not moved <= model.note["check"]["bounds"]["deviation"]:  # nor where it is no number
            parser.exit(1, "This machine does not give the model's scores.\n" if moved is not None else "")
    if not arguments.images:
        return
    arguments.output.mkdir(parents=True, exist_ok=True)
    results, refused = [], []
    for file, name in zip(arguments.images, names(arguments.images), strict=True):
        try:
            result = judged(model, file, arguments.output, arguments.threshold, name)
        except BROKEN as error:
            refused.append(f"{file}: {error}.")
            continue
        results.append(result)
        decision = "" if result["anomalous"] is None else f", anomalous {result['anomalous']}"
        found = "" if result["boxes"] is None else f", boxes {result['boxes']}"
        print(f"{file}: score {result['score']:.4f}{decision}{found}")
    (arguments.output / "judged.json").write_text(json.dumps(results, indent=2) + "\n")
    if refused:
        parser.exit(2, "\n".join(refused) + "\n")


if __name__ == "__main__":
    main()
