"""One-class data sets that live in memory, and how anomalib's visualizer gets to see them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from anomalib.data import ImageBatch
from anomalib.visualization.base import Visualizer
from lightning.pytorch import Callback, LightningModule, Trainer
from pandas import DataFrame
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from kd_multiresolution.data.base import OneClassDataset


class Pixels:
    """All images of a data module, uint8, (N, 1 or 3, H, W); a deep copy is the object itself.

    anomalib deep-copies a data set for each split. With ``fork`` the loader processes share the pages, with ``spawn``
    torch hands the tensor over in shared memory.
    """

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __deepcopy__(self, memo: dict[int, Any]) -> Pixels:
        """Return the same object."""
        return self


class MemoryImages(OneClassDataset):
    """A one-class data set of images in memory.

    Args:
        samples: rows as in :class:`OneClassDataset`, with ``position`` (int), the image's position in ``pixels``. The
            ``image_path`` is a name, not a file.
        pixels: the images of all splits.
    """

    def __init__(self, samples: DataFrame, pixels: Pixels) -> None:
        super().__init__(samples)
        self.pixels = pixels

    def raw(self, index: int) -> Tensor:
        """Return the stored image of a row, uint8, (1 or 3, H, W)."""
        return self.pixels.images[int(self.field(index, "position"))]

    def read(self, index: int) -> Tensor:
        """Return the image of a row as a (3, H, W) float tensor in [0, 1]; a grey one three times."""
        raw = self.raw(index)
        return raw.expand(3, -1, -1).to(torch.float32) / 255


class SampledVisualizer(Callback):
    """Stands in for a visualizer: lets it draw some of the images, each a file for as long as that takes.

    anomalib's visualizer opens ``image_path`` again for each image and saves a picture of it. Images in memory have no
    file, and nobody looks at 10,000 pictures of 28 x 28 pixels, which take longer than the test. So a few per class
    are written to a temporary folder, drawn, and removed again; the batch is left as it is.

    Args:
        visualizer: the visualizer, called for the chosen images of each batch.
        images: the images to draw by their ``image_path``, uint8, (1 or 3, H, W).
    """

    def __init__(self, visualizer: Visualizer, images: Mapping[str, Tensor]) -> None:
        self.visualizer = visualizer
        self.images = images

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the visualizer know."""
        self.visualizer.on_test_start(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the visualizer know."""
        self.visualizer.on_predict_start(trainer, pl_module)

    def on_test_batch_end(self, *arguments: Any, **named: Any) -> None:
        """Have the chosen images of a tested batch drawn."""
        self._draw(self.visualizer.on_test_batch_end, *arguments, **named)

    def on_predict_batch_end(self, *arguments: Any, **named: Any) -> None:
        """Have the chosen images of a predicted batch drawn."""
        self._draw(self.visualizer.on_predict_batch_end, *arguments, **named)

    def _draw(
        self,
        hook: Callable[..., None],
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: ImageBatch,
        *rest: Any,
        **named: Any,
    ) -> None:
        if self.images.keys().isdisjoint(batch.image_path or ()):  # most batches: not taken apart
            return
        chosen = [(item, path) for item in batch if (path := item.image_path) is not None and path in self.images]
        with TemporaryDirectory(prefix="kd_multiresolution_") as folder:
            for item, path in chosen:
                # The visualizer names its picture by the folders below the data module's name.
                file = Path(folder, path)
                file.parent.mkdir(parents=True, exist_ok=True)
                to_pil_image(self.images[path]).save(file)
                item.image_path = str(file)
            drawn = ImageBatch.collate([item for item, _ in chosen])
            hook(trainer, pl_module, outputs, drawn, *rest, **named)
