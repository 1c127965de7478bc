"""The paper's protocol: average over the late epochs, never the best one (Sec. 4 of arXiv 2011.11108).

"Unlike other methods that report their maximum achieved results, we report an average on our trained models, sampled
every 10 epochs after convergence."
"""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Mapping
from itertools import compress
from pathlib import Path
from typing import Any, cast

import torch
from anomalib.data import AnomalibDataModule, ImageBatch, InferenceBatch
from anomalib.models.components import AnomalibModule
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms.v2 import Compose, Normalize, Resize, Transform
from torchvision.transforms.v2.functional import to_image

from kd_multiresolution.plugin.image_files import ImageFileCheck
from kd_multiresolution.results.raw_metrics import Predictions, check_both_kinds, raw_metrics
from kd_multiresolution.training.convergence import ConvergenceStopping
from kd_multiresolution.training.evaluation_mode import evaluation_mode

logger = logging.getLogger(__name__)

RESULT_FILE = "evaluation_after_convergence.json"


class EvaluationAfterConvergence(ConvergenceStopping):
    """Evaluates every ``interval`` epochs after convergence, and stops after ``evaluations`` of them.

    Takes the place of :class:`ConvergenceStopping`, with the same criterion. Each evaluation scores all test images, in
    the precision that a test has; the metrics of :func:`~kd_multiresolution.results.raw_metrics.raw_metrics` see raw
    scores, before any post-processing. Mean and sample standard deviation over the evaluations are logged
    (``raw_<metric>_mean`` and ``raw_<metric>_std``, not before the second one), kept in :attr:`summary`, and written to
    ``evaluation_after_convergence.json`` in the run's folder. A training that has not converged is evaluated after its
    last epochs before ``max_epochs``, as far apart; whatever else ends a training, its last epoch is evaluated. The
    file says after which epochs, and whether the loss had converged.

    ``pixel_AUROC_anomalous`` is left out where the data module augments test images: mask files are read without its
    augmentations.

    Training is not disturbed: random numbers, modes and weights are as found.

    Args:
        evaluations: how many evaluations there are, 1 or more; the first is made at convergence.
        interval: epochs from one to the next, 1 or more.
        window: see :class:`ConvergenceStopping`.
        tolerance: see :class:`ConvergenceStopping`.

    Raises:
        ValueError: if an argument is out of range; when training starts, if there is no data module, or its test set is
            not of normal and anomalous images.
    """

    def __init__(self, evaluations: int = 5, interval: int = 10, window: int = 20, tolerance: float = 0.03) -> None:
        super().__init__(window=window, tolerance=tolerance)
        for name, number in (("evaluations", evaluations), ("interval", interval)):
            if number < 1:
                msg = f"{name}={number!r}: expected 1 or more."
                raise ValueError(msg)
        self.evaluations = evaluations
        self.interval = interval
        self.converged_after: int | None = None
        self._trained = 0  # epochs of this run
        self.epochs: list[int] = []
        self.values: dict[str, list[float]] = {}

    def begin(self) -> None:
        """Begin anew."""
        super().begin()
        self.converged_after, self._trained, self.epochs, self.values = None, 0, [], {}

    @property
    def summary(self) -> dict[str, Any]:
        """What is written: epochs evaluated, epochs to convergence or ``None``, and each metric's mean, std, values."""
        return {
            "converged_after": self.converged_after,
            "evaluated_after": self.epochs,
            "metrics": {name: spread(values) for name, values in self.values.items()},
        }

    def models(self, pl_module: AnomalibModule) -> Mapping[str, nn.Module]:
        """Return the models to evaluate, in evaluation mode an ``InferenceBatch`` each, by a prefix of their metrics.

        For a subclass that compares several readings of one training.
        """
        return {"": pl_module.model}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that there is something to evaluate on, and that it can be read aright, before hours of training."""
        del pl_module
        datamodule = _datamodule(trainer)
        if not isinstance(datamodule, AnomalibDataModule):
            msg = f"{type(self).__name__} evaluates on the test set of anomalib's data modules: give fit a datamodule."
            raise ValueError(msg)
        ImageFileCheck().check_dataset(datamodule.test_data)
        check_both_kinds(int(datamodule.test_data.samples["label_index"].sum()), len(datamodule.test_data), "images")
        if (augmentation := _augmentation(datamodule)) is not None:
            logger.info("pixel_AUROC_anomalous is left out: %s is not done to mask files.", augmentation)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop a training that is resumed after its last evaluation: what would be learnt now is evaluated nowhere.

        One that has not converged may have another limit now: evaluations that are not of its last epochs are dropped.
        """
        del pl_module
        if self.converged_after is None:
            due = [self._is_due(epoch, trainer.max_epochs) for epoch in self.epochs]
            self.epochs = [*compress(self.epochs, due)]
            self.values = {name: [*compress(values, due)] for name, values in self.values.items()}
        elif len(self.epochs) >= self.evaluations:
            trainer.should_stop = True

    def on_epoch_loss(self, trainer: Trainer) -> None:
        """Note the convergence, and stop with the last evaluation, so that this epoch's validation still runs."""
        epochs = self._trained = trainer.current_epoch + 1
        if self.converged and self.converged_after is None:
            self.converged_after = epochs
            self.epochs, self.values = [], {}  # of the last epochs before the limit, in case it never converged
            self.report(epochs)
        if self._is_due(epochs, trainer.max_epochs) and len(self.epochs) + 1 >= self.evaluations:
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate if this epoch is one of those to evaluate, or training ends with it."""
        epochs = trainer.current_epoch + 1
        ends = trainer.should_stop or epochs == trainer.max_epochs or trainer.global_step == trainer.max_steps
        if len(self.epochs) >= self.evaluations or not (ends or self._is_due(epochs, trainer.max_epochs)):
            return
        self._keep(trainer, pl_module, epochs)
        for name, values in self.values.items():
            pl_module.log_dict({f"raw_{name}{key}": number for key, number in _logged(values).items()})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the last epoch if a callback has ended training after :meth:`on_train_epoch_end`."""
        if self._trained and self._trained not in self.epochs and len(self.epochs) < self.evaluations:
            self._keep(trainer, pl_module, self._trained)  # too late for Lightning's log

    def _keep(self, trainer: Trainer, pl_module: LightningModule, epochs: int) -> None:
        """Evaluate, and write all evaluations so far."""
        metrics = self.evaluate(trainer, cast("AnomalibModule", pl_module))
        self.epochs.append(epochs)
        for name, value in metrics.items():
            self.values.setdefault(name, []).append(value)
        logger.info("After %d epochs, raw scores: %s.", epochs, ", ".join(f"{k} {v:.4f}" for k, v in metrics.items()))
        if trainer.is_global_zero:
            file = Path(trainer.default_root_dir) / RESULT_FILE
            file.parent.mkdir(parents=True, exist_ok=True)
            unfinished = file.with_suffix(".unfinished")  # so that a file of that name is never there in part
            unfinished.write_text(json.dumps(self.summary, indent=2) + "\n")
            unfinished.replace(file)

    def evaluate(self, trainer: Trainer, pl_module: AnomalibModule) -> dict[str, float]:
        """Return the metrics of the current weights on all test images, and leave everything as it is."""
        datamodule = cast("AnomalibDataModule", _datamodule(trainer))
        models = self.models(pl_module)
        samples = datamodule.test_data.samples
        # Not the batch's: anomalib drops the paths of a batch whose first image is normal.
        mask_files = {i: m for i, m in zip(samples["image_path"], samples["mask_path"], strict=True) if m}
        predictions: dict[str, list[Predictions]] = {prefix: [] for prefix in models}
        augmented = _augmentation(datamodule) is not None
        with evaluation_mode(models.values()):
            for index, on_host in enumerate(datamodule.test_dataloader()):
                # What the data module itself has done to the images is not done to the mask files.
                coverage = None if augmented else read_coverage(on_host, mask_files, pl_module.pre_processor)
                batch: ImageBatch = trainer.strategy.batch_to_device(on_host)
                if isinstance(pl_module.pre_processor, Callback):
                    pl_module.pre_processor.on_test_batch_start(trainer, pl_module, batch, index)
                for prefix, model in models.items():
                    with trainer.precision_plugin.test_step_context():
                        output = model(batch.image)
                    predictions[prefix].append(_predictions(output, batch, coverage))
        return {
            f"{prefix}{name}": value
            for prefix, parts in predictions.items()
            for name, value in raw_metrics(_joined(parts)).items()
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the losses, and the evaluations so far."""
        evaluations = {
            "converged_after": self.converged_after,
            "epochs": list(self.epochs),
            "values": dict(self.values),
        }
        return {**super().state_dict(), **evaluations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the losses and the evaluations."""
        super().load_state_dict(state_dict)
        self.converged_after = state_dict["converged_after"]
        self.epochs = list(state_dict["epochs"])
        self.values = {name: list(values) for name, values in state_dict["values"].items()}

    def _is_due(self, epochs: int, max_epochs: int | None) -> bool:
        if self.converged_after is not None:
            return (epochs - self.converged_after) % self.interval == 0
        if max_epochs is None:
            return False
        return epochs in range(max_epochs, 0, -self.interval)[: self.evaluations]


def _augmentation(datamodule: AnomalibDataModule) -> Transform | None:
    """Return what the data module itself does to test images; anomalib puts the model's size in place of a resize."""
    own = datamodule.test_augmentations
    return None if isinstance(own, Resize) else own


def _datamodule(trainer: Trainer) -> object:
    """Return what is trained on; ``trainer.datamodule`` may be that of an earlier run."""
    return trainer.fit_loop._data_source.instance


def spread(values: list[float]) -> dict[str, Any]:
    """Return mean and sample standard deviation, which is ``None`` for a single value, and the values.

    Example:
        >>> spread([0.5, 0.75])["mean"]
        0.625
    """
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": deviation, "values": list(values)}


def read_coverage(batch: ImageBatch, mask_files: Mapping[str, str], pre_processor: nn.Module | None) -> Tensor | None:
    """Read the masks of the batch's anomalous images and resize them like the images, without rounding.

    anomalib resizes masks by their nearest pixels; the paper's are resized bilinearly and left fractional.

    Args:
        batch: with ``image_path`` and ``gt_label``, and ``gt_mask`` if the data set has masks.
        mask_files: the mask file of each anomalous image by its ``image_path``.
        pre_processor: anomalib's; all of its transform but the normalisation is applied.

    Returns:
        (N, H, W), in [0, 1], zero for normal images; ``None`` if the data set has no masks, or one has no file.
    """
    if batch.gt_mask is None or batch.gt_label is None or batch.image_path is None:
        return None
    resize = _geometry(pre_processor.transform if isinstance(pre_processor, PreProcessor) else None)
    coverage = []
    images = cast("Tensor", batch.image)
    for path, image, label in zip(batch.image_path, images, batch.gt_label.tolist(), strict=True):
        if not label:
            mask = tv_tensors.Image(torch.zeros(1, *image.shape[-2:]))
        elif mask_file := mask_files.get(path):
            with Image.open(mask_file) as file:
                # Whatever is above zero belongs to the mask, as anomalib reads it.
                mask = tv_tensors.Image((to_image(file.convert("L")) > 0).float())
        else:
            return None
        coverage.append(resize(mask).as_subclass(Tensor)[0])
    return torch.stack(coverage)


def _geometry(transform: Transform | None) -> nn.Module:
    parts = list(transform.transforms) if isinstance(transform, Compose) else [transform] if transform else []
    return nn.Sequential(*(part for part in parts if not isinstance(part, Normalize)))


def _predictions(output: InferenceBatch, batch: Any, coverage: Tensor | None) -> Predictions:
    has_masks = batch.gt_mask is not None  # maps that nothing is compared with would only fill the memory
    return Predictions(
        scores=cast("Tensor", output.pred_score).detach().cpu().flatten(),
        labels=batch.gt_label.cpu().int(),
        maps=output.anomaly_map.detach().cpu() if has_masks and output.anomaly_map is not None else None,
        masks=batch.gt_mask.as_subclass(Tensor).cpu().bool() if has_masks else None,
        coverage=coverage,
    )


def _joined(parts: list[Predictions]) -> Predictions:
    def joined(name: str) -> Tensor | None:
        tensors = [getattr(part, name) for part in parts]
        return None if any(tensor is None for tensor in tensors) else torch.cat(tensors)

    fields = {name: joined(name) for name in Predictions.__dataclass_fields__}
    return Predictions(**fields)  # type: ignore[arg-type]


def _logged(values: list[float]) -> dict[str, float]:
    """Return what is logged of a metric: the last value, and mean and deviation as soon as there are two."""
    summary = spread(values)
    several = {} if summary["std"] is None else {"_mean": summary["mean"], "_std": summary["std"]}
    return {"": values[-1], **several}
