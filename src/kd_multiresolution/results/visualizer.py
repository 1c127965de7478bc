"""Pictures of what the model saw: anomalib's, and heat maps as in the paper's Fig. 6, where low scores are omitted."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

from anomalib.data import ImageBatch, ImageItem
from anomalib.visualization import ImageVisualizer
from anomalib.visualization.image.functional import add_text_to_image, dynamic_font_size
from anomalib.visualization.image.item_visualizer import visualize_image_item
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_image

from kd_multiresolution.plugin.arguments import check_types
from kd_multiresolution.results.drawing import heat_map, mask, together
from kd_multiresolution.results.judged import MIDDLE, JudgedRun, Scale
from kd_multiresolution.results.tiles import WEBP_SIDE

SMALLEST_TEXT, MARGIN = 8, 10  # pixels
OWN_RANGE = "raw, in its own range"
LARGEST_SIDE = {".webp": WEBP_SIDE, ".jpg": 65500, ".jpeg": 65500}  # pixels; a larger picture becomes a PNG


class FrameVisualizer(ImageVisualizer):
    """anomalib's visualizer, with pictures of what the model saw; the default of our models.

    anomalib's own shows the whole file as a square, also where a pre-processor has cropped it, beside masks and maps of
    the crop. Here all pictures of an image show the same part of the file, in the file's proportions; ``field_size``
    says how many pixels each has. No picture overwrites another one: where images would share a name, the names are
    longer than anomalib's. A map without a threshold has colours of its own range, and the picture says so.

    Args:
        as_large_as_file: each picture has as many pixels as the file has of what it shows, whatever ``field_size`` is.
        **kwargs: as anomalib's.
    """

    def __init__(self, as_large_as_file: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.as_large_as_file = as_large_as_file
        self.run = _anomalibs()

    def __getstate__(self) -> dict[str, Any]:
        """Return what an exported model needs: nothing of the last run."""
        return {**self.__dict__, "run": _anomalibs()}

    def draw(self, item: ImageItem) -> Image.Image | None:
        """Return the pictures of one image side by side, or ``None`` if there is none of what is asked for."""
        picture = self._seen(item)
        shown: dict[str, Any] = {"image": to_image(picture), "image_path": None}
        if item.anomaly_map is not None:
            shown["anomaly_map"] = self.run.maps.colours(item.anomaly_map)
        if not self.run.maps.decides:
            shown["pred_mask"] = None
        frame = item.update(in_place=False, **shown)
        drawn = visualize_image_item(
            frame,
            fields=self.fields,
            overlay_fields=self.overlay_fields,
            field_size=picture.size,
            fields_config=self.fields_config,
            overlay_fields_config=self.overlay_fields_config,
            text_config={**self.text_config, "size": self.text_config["size"] or _text_size(picture)},
        )
        panels = [*((field, []) for field in self.fields), *self.overlay_fields]
        there = [[base, *over] for base, over in panels if getattr(frame, base, None) is not None]
        of_maps = [number for number, names in enumerate(there) if "anomaly_map" in names]
        return self._noted(drawn, item, picture, of_maps[0]) if drawn and of_maps else drawn

    def visualize(self, predictions: Any) -> Image.Image | list[Image.Image | None] | None:
        """Return as anomalib's: a picture of one image, or a list of those of a batch.

        Args:
            predictions: an image or a batch. Of tensors, those of the last test or prediction are shown in its frame.
        """
        if isinstance(predictions, ImageItem):
            return self.draw(predictions)
        if isinstance(predictions, ImageBatch):
            drawn = [self.draw(item) for item in predictions]
            return drawn[0] if len(drawn) == 1 else drawn
        return super().visualize(predictions)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See what decides, and what the model sees of its images."""
        self.run = JudgedRun.of(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do as :meth:`on_test_start`."""
        self.on_test_start(trainer, pl_module)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: ImageBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw every image of the batch into a file."""
        del pl_module, outputs
        folder = Path(self.output_dir or Path(trainer.default_root_dir) / "images")
        for number, item in enumerate(batch):
            path = getattr(item, "image_path", None)
            name = self.run.names(path) if path else f"{dataloader_idx}_{batch_idx:05d}_{number:03d}.png"
            if (drawn := self.draw(item)) is not None:
                most = LARGEST_SIDE.get(Path(name).suffix.lower(), math.inf)
                file = folder / (name if max(drawn.size) <= most else f"{name}.png")
                file.parent.mkdir(parents=True, exist_ok=True)
                drawn.save(file)

    def _seen(self, item: ImageItem) -> Image.Image:
        size = None if self.as_large_as_file else self.field_size
        return self.run.view.picture(cast("Tensor", item.image), getattr(item, "image_path", None), size)

    def _noted(self, drawn: Image.Image, item: ImageItem, picture: Image.Image, number: int) -> Image.Image:
        """Return pictures side by side with a note on a heat map among them if its colours are no other one's."""
        scale = self.run.maps
        config = dict(self.text_config)
        if item.anomaly_map is None or not scale.has_own_range(item.anomaly_map) or not config.pop("enable"):
            return drawn
        config["size"] = config["size"] or _text_size(picture)
        position = (number * picture.width + MARGIN, picture.height - 2 * config["size"])
        return add_text_to_image(drawn, OWN_RANGE, position=position, **config)


class ThresholdVisualizer(FrameVisualizer):
    """Draws image, mask and the image under its heat map, the last only where a score is high enough.

    :class:`FrameVisualizer` covers the whole image. This one needs a map, and a post-processor that normalises it.
    Use it as ``visualizer=ThresholdVisualizer()``, or ``--model.visualizer kd_multiresolution.ThresholdVisualizer``.

    Args:
        omit_below: normalised score, in [0, 1], below which pixels are omitted. Default: those are shown that the
            post-processor marks.
        field_size: a width and a height: each of the pictures has as many pixels, in the proportions of the file.
        output_dir: folder to write to; default: as anomalib's visualizer.

    Raises:
        TypeError: if an argument has another type.
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        omit_below: float | None = None,
        field_size: tuple[int, int] = (256, 256),
        output_dir: str | Path | None = None,
    ) -> None:
        check_types(ThresholdVisualizer.__init__, locals())
        if omit_below is not None and not 0 <= omit_below <= 1:
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
            item: predictions of one image; before any test or prediction, its map is taken for normalised.

        Raises:
            ValueError: if there is no anomaly map.
        """
        if item.anomaly_map is None:
            msg = "anomaly_map=None: this model gives scores alone. Use visualizer=False (--model.visualizer false)."
            raise ValueError(msg)
        picture = self._seen(item)
        scale = self.run.maps
        colours = scale.colours(item.anomaly_map)
        if self.omit_below is None or scale.has_own_range(item.anomaly_map):
            inside = scale.marked(item.anomaly_map, item.pred_mask)
        else:
            inside = colours - self.omit_below + MIDDLE
        true = [] if item.gt_mask is None else [mask(item.gt_mask, picture)]
        drawn = [picture, *true, heat_map(picture, colours, inside)]
        return self._noted(together(drawn), item, picture, len(drawn) - 1)


def _anomalibs() -> JudgedRun:
    """Return what is known of images without a test or a prediction: anomalib's maps have 0.5 as their threshold."""
    return JudgedRun(maps=Scale("normalised", MIDDLE))


def _text_size(picture: Image.Image) -> int:
    """Return the size of anomalib's titles, or less in a narrow picture, so that its longest one is whole."""
    longest = "Image + Anomaly Map"
    return min(dynamic_font_size(picture.size), max(SMALLEST_TEXT, 2 * picture.width // (len(longest) + 2)))


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
