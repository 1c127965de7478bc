"""Write ``configs/<data set>.yaml`` from the paper's settings in ``kd_multiresolution.paper.presets``.

python benchmarks/write_configs.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from kd_multiresolution.paper.presets import BATCH_SIZE, LEARNING_RATE, PRESETS, Preset

CONFIGS = Path(__file__).parents[1] / "configs"


def render(name: str, preset: Preset) -> str:
    """Return the text of a configuration that ``anomalib train --config`` takes."""
    model: dict[str, Any] = {"source": "vgg16.tv_in1k", "value_weight": preset.value_weight}
    if preset.resize is None:
        model["image_size"] = list(preset.image_size)
        model["imagenet_normalization"] = preset.imagenet_normalization
    else:
        model["pre_processor"] = _resize_and_cut(preset)
    model["learning_rate"] = LEARNING_RATE
    configuration = {
        "model": {"class_path": "kd_multiresolution.KdMultiresolution", "init_args": model},
        "data": {
            "class_path": f"anomalib.data.{preset.data}",
            "init_args": {**preset.data_arguments, "train_batch_size": BATCH_SIZE},
        },
    }
    header = [
        f"# The paper's settings for this data set: anomalib train --config configs/{name}.yaml",
        "# Written by benchmarks/write_configs.py.",
        "# Training stops when the training loss has converged.",
    ]
    if preset.epochs is not None:
        header.append(f"# The published code's fixed number of epochs: --model.epochs {preset.epochs}")
    return "\n".join(header) + "\n" + yaml.safe_dump(configuration, sort_keys=False)


def _resize_and_cut(preset: Preset) -> dict[str, Any]:
    """Return anomalib's pre-processor with a resize, a cut of the centre, and ImageNet's normalisation if asked for."""
    transforms = [
        # The paper's Lanczos filter exists for files only, not for tensors; this is the nearest to it.
        _transform("Resize", size=list(preset.resize or ()), interpolation="bicubic"),
        _transform("CenterCrop", size=list(preset.image_size)),
    ]
    if preset.imagenet_normalization:
        transforms.append(_transform("Normalize", mean=list(IMAGENET_DEFAULT_MEAN), std=list(IMAGENET_DEFAULT_STD)))
    return {
        "class_path": "anomalib.pre_processing.PreProcessor",
        "init_args": {"transform": _transform("Compose", transforms=transforms)},
    }


def _transform(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"torchvision.transforms.v2.{name}", "init_args": arguments}


if __name__ == "__main__":
    for name, preset in PRESETS.items():
        path = CONFIGS / f"{name}.yaml"
        path.write_text(render(name, preset))
        print(path)
