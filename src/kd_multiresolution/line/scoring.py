"""Raw scores of image files by a model that is loaded."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from anomalib.data import PredictDataset
from anomalib.models.components import AnomalibModule
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from kd_multiresolution.line.choice import Scores
from kd_multiresolution.plugin.pictures import STATISTICS


@dataclass(eq=False)
class RawScores(Callback):
    """What a model says of some images, as it says it, and what these are like.

    Attributes:
        scores: of the images.
        peaks: the largest value of each image's map; empty if the model makes none.
        pictures: statistics of the images by name.
    """

    scores: list[float] = field(default_factory=list)
    peaks: list[float] = field(default_factory=list)
    pictures: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in STATISTICS})

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Take in a batch."""
        del trainer, args, kwargs
        self.scores += outputs.pred_score.flatten().tolist()
        if outputs.anomaly_map is not None:
            self.peaks += outputs.anomaly_map.flatten(1).amax(1).tolist()
        for name, values in cast("Any", pl_module).picture_statistics(outputs.image).items():
            self.pictures[name] += values

    @property
    def of_images(self) -> Scores:
        """The scores as an array."""
        return np.array(self.scores)

    @property
    def of_maps(self) -> Scores:
        """The peaks as an array."""
        return np.array(self.peaks)


def raw_scores(model: AnomalibModule, images: str | Path, argument: str) -> RawScores:
    """Return what a model says of the images in a folder, or of one file.

    Args:
        model: one that has no post-processor at the moment.
        images: the folder.
        argument: which argument names it, for errors.

    Raises:
        ValueError: if there is no image.
    """
    try:
        dataset = PredictDataset(images)
    except (OSError, ValueError, RuntimeError) as error:
        msg = f"{argument}={str(images)!r}: expected a folder of images ({error})."
        raise ValueError(msg) from error
    found = RawScores()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            default_root_dir=folder, logger=False, callbacks=[found], enable_checkpointing=False, devices=1,
            enable_model_summary=False,
        )  # fmt: skip
        loader = DataLoader(dataset, collate_fn=dataset.collate_fn)  # one by one: files may differ in size
        trainer.predict(model, loader, return_predictions=False)
    return found
