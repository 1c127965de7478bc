"""Heat maps as in the paper's Fig. 6: low scores are omitted, so that the image shows where nothing is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from anomalib.data import ImageBatch, ImageItem
from anomalib.utils.path import generate_output_filename
from anomalib.visualization import ImageVisualizer
from anomalib.visualization.image.functional import (
    create_image_grid,
    overlay_image,
    visualize_anomaly_map,
)
from anomalib.visualization.image.item_visualizer import visualize_image_item
from lightning.pytorch import LightningModule, Trainer
from PIL import Image

from kd_multiresolution.plugin.arguments import check_types

ALPHA = 0.5  # opacity of the heat map, as anomalib's


class ThresholdVisualizer(ImageVisualizer):
    """Draws image, mask and the image under its heat map, the last only where a score is high enough.

    anomalib's own visualizer covers the whole image. This one needs a map, and a post-processor that normalises it.
    Use it as ``visualizer=ThresholdVisualizer()``, or ``--model.visualizer kd_multiresolution.ThresholdVisualizer``.

    Args:
        omit_below: normalised score, in [0, 1], below which pixels are omitted; 0.5 is the pixel threshold.
        field_size: width and height of each of the pictures in pixels.
        output_dir: folder to write to; default: as anomalib's visualizer.

    Raises:
        TypeError: if an argument has another type.
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        omit_below: float = 0.5,
        field_size: tuple[int, int] = (256, 256),
        output_dir: str | Path | None = None,
    ) -> None:
        check_types(ThresholdVisualizer.__init__, locals())
        if not 0 <= omit_below <= 1:
            msg = f"omit_below={omit_below!r}: expected a normalised score, 0 to 1."
            raise ValueError(msg)
        if min(field_size) < 1:
            msg = f"field_size={field_size!r}: expected a width and a height in pixels, 1 or more."
            raise ValueError(msg)
        super().__init__(field_size=field_size, output_dir=output_dir)
        self.omit_below = omit_below

    def draw(self, item: ImageItem) -> Image.Image:
        """Return the pictures of one image side by side: image, true mask where there is one, heat map.

        Args:
            item: predictions of one image; its ``anomaly_map``, (H, W) or (1, H, W), is normalised.

        Raises:
            ValueError: if there is no anomaly map.
        """
        if item.anomaly_map is None:
            msg = "anomaly_map=None: this model gives scores alone. Use visualizer=False (--model.visualizer false)."
            raise ValueError(msg)
        plain: dict[str, Any] = {"field_size": self.field_size, "text_config": {"enable": False}}
        picture, mask = (visualize_image_item(item, fields=[field], **plain) for field in ("image", "gt_mask"))
        picture = cast("Image.Image", picture).convert("RGB")
        width, height = self.field_size
        scores = item.anomaly_map.detach().float().reshape(1, 1, *item.anomaly_map.shape[-2:])
        scores = F.interpolate(scores, size=(height, width), mode="bilinear", align_corners=False)[0, 0].cpu()
        heat = overlay_image(picture, visualize_anomaly_map(scores.clamp(0, 1)), alpha=ALPHA).convert("RGB")
        shown = Image.fromarray(((scores >= self.omit_below) * 255).to(torch.uint8).numpy())
        pictures = [picture, *([mask] if mask else []), Image.composite(heat, picture, shown)]
        return create_image_grid(pictures, nrow=len(pictures))

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: ImageBatch,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Draw every image of the batch into a file, named as anomalib names them."""
        del pl_module, outputs, args, kwargs
        if self.output_dir is None:
            self.output_dir = Path(trainer.default_root_dir) / "images"
        data = getattr(trainer, "datamodule", None)
        for item in batch:
            file = generate_output_filename(
                input_path=item.image_path or "",
                output_path=self.output_dir,
                dataset_name=getattr(data, "name", None),
                category=getattr(data, "category", None),
            )
            self.draw(item).save(file)


def check_drawable(visualizer: object, post_processor: object, *, has_maps: bool) -> None:
    """Check that there is what a :class:`ThresholdVisualizer` draws.

    Args:
        visualizer: a model's argument of that name.
        post_processor: the model's.
        has_maps: whether the model gives anomaly maps.

    Raises:
        ValueError: if such a visualizer gets no maps, or none that are normalised.
    """
    if isinstance(visualizer, ThresholdVisualizer) and (not has_maps or post_processor is False):
        msg = (
            f"visualizer=ThresholdVisualizer(), {'' if has_maps else 'anomaly_map=None, '}post_processor="
            f"{post_processor!r}: it draws normalised maps. Use visualizer=False, or give it both."
        )
        raise ValueError(msg)
