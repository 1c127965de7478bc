"""Normal images that the cloners never learn from: what is normal, and what a map is worth, is told from them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from kd_multiresolution.dual.calibration import CHUNK, Calibration, ImageScore, Precision, calibrate
from kd_multiresolution.dual.painted_defects import out_of_focus, painted
from kd_multiresolution.dual.position import PositionMoments
from kd_multiresolution.dual.standardization import standardize
from kd_multiresolution.dual.torch_model import KdMultiresolutionDualModel
from kd_multiresolution.plugin.finite import check_finite
from kd_multiresolution.source.channel_moments import ChannelMoments, Reduce
from kd_multiresolution.source.region import within
from kd_multiresolution.training.batches import fork_rng
from kd_multiresolution.training.evaluation_mode import mark_of

logger = logging.getLogger(__name__)

HELD_OUT_FRACTION = 8  # one of so many normal images
MOST_HELD_OUT = 64
FEWEST_HELD_OUT = 4
FEWEST_IMAGES = 4
PAINTED = 64  # pictures with a painted defect, or as many as there are held-out images


def held_out_images(paths: Iterable[str], seed: int) -> frozenset[str]:
    """Choose the normal images that only statistics are taken from: one in eight, at most 64.

    Of few images relatively more, up to 4: a threshold told from two images would be out of reach.

    Args:
        paths: of all training images.
        seed: of the choice, which does not depend on the order of the paths.

    Raises:
        ValueError: if there are fewer than four images.
    """
    ordered = sorted(set(paths))
    if len(ordered) < FEWEST_IMAGES:
        msg = (
            f"{len(ordered)} training images: KdMultiresolutionDual trains on some and takes its statistics from "
            f"others, at least two of each. Give it {FEWEST_IMAGES} or more, or use KdMultiresolution."
        )
        raise ValueError(msg)
    count = min(max(len(ordered) // HELD_OUT_FRACTION, min(len(ordered) // 2, FEWEST_HELD_OUT)), MOST_HELD_OUT)
    order = torch.randperm(len(ordered), generator=torch.Generator().manual_seed(seed)).tolist()
    return frozenset(ordered[i] for i in order[:count])


class HeldOutImages:
    """The held-out images of a training, and the features of them that its calibrations need.

    Args:
        model: what is trained.
        seed: of the choice of held-out images.
        image_score: images are judged by their ``defects``, as a ``whole``, or, if ``auto``, as held-out images say.
    """

    def __init__(self, model: KdMultiresolutionDualModel, seed: int, image_score: ImageScore = "auto") -> None:
        self.model = model
        self.seed = seed
        self.image_score = image_score
        self.held_out: frozenset[str] = frozenset()
        self.names_before: list[str] | None = None
        self.random_state: Tensor | None = None  # with which the training images were looked at
        self._calibrated: bytes | None = None  # the mark of the weights
        self._judgement = ""  # how images are judged by these weights, in words
        self._precision: Precision = nullcontext
        self.image_size = (0, 0)  # known with the first images
        self._normal: list[Tensor] = []
        self._blurred: list[Tensor] = []
        self._defective: list[Tensor] = []

    @contextmanager
    def look_ahead(self, *, resumed: bool) -> Iterator[None]:
        """Look at the training images with random numbers of one's own, those of the first training if it is resumed.

        The global random generator decides their order, and what random augmentation makes of them.
        """
        with fork_rng(self.model.family_weight.device):
            if resumed and self.random_state is not None:
                torch.set_rng_state(self.random_state)
            self.random_state = torch.get_rng_state()
            yield

    def start(
        self,
        paths: Sequence[str],
        batches: Iterable[tuple[Sequence[str], Tensor, list[Tensor]]],
        reduce: Reduce,
        *,
        resumed: bool,
        precision: Precision = nullcontext,
    ) -> None:
        """Choose the held-out images, keep their features, and tell what is normal from the others if it is not known.

        That is mean and deviation of each channel, by which features are standardised, and both at each position.

        Features are kept of each image as it is, out of focus, and with painted defects.

        Args:
            paths: of all training images.
            batches: paths, images and source features of this process's training images.
            reduce: sums over all processes.
            resumed: whether this training goes on with another.
            precision: in which features are computed, and predictions of them.

        Raises:
            ValueError: if there are fewer than four images, one of them is not finite, fewer than two of those that are
                held out are among the batches, they differ in size, or a resumed training held out others.
        """
        self._precision = precision
        self._calibrated = None  # these images may be others than those of a training that has failed
        self.held_out = held_out_images(paths, self.seed)
        if resumed:
            self._check_held_out()
        moments, positions = ChannelMoments(), PositionMoments()
        kept: dict[str, Tensor] = {}
        for batch_paths, images, features in batches:
            check_finite(images, batch_paths)
            for i, path in enumerate(batch_paths):
                if path in self.held_out:
                    kept[path] = images[i].clone()
            fitted = self.fitted(batch_paths)
            moments.add([level[fitted] for level in features])
            positions.add(features[1][fitted])
            empty = images[:0]
        self._check_kept(kept, reduce)
        # In the order of their paths, on which the last digits of features and sums depend.
        held_out = torch.stack([kept[path] for path in sorted(kept)]) if kept else empty
        self.image_size = (held_out.shape[-2], held_out.shape[-1])
        generator = torch.Generator().manual_seed(self.seed)
        copies = max(PAINTED // len(self.held_out), 1)  # however many of them this process has
        self._normal = self._features(held_out)
        self._defective = self._features(
            torch.cat([painted(held_out, generator, self.model.source.region) for _ in range(copies)])
        )
        self._blurred = self._features(out_of_focus(held_out))
        if not resumed:
            standardize(self.model.levels_units, moments, reduce)
            self.model.position.set(positions, reduce)

    def _features(self, images: Tensor) -> list[Tensor]:
        """Return the source's features of the images, of which a blur or a paste may have left the region."""
        region = self.model.source.region
        with torch.no_grad(), self._precision():
            features = [
                self.model.source(chunk.contiguous(memory_format=torch.channels_last))
                for chunk in torch.split(within(images, region), CHUNK)
            ]
        return [torch.cat(level).to(images.dtype) for level in zip(*features, strict=True)]

    def _check_kept(self, kept: Mapping[str, Tensor], reduce: Reduce) -> None:
        """Check that the batches had what statistics can be taken of."""
        seen = int(reduce(self.model.family_weight.new_tensor(float(len(kept)))))
        if seen < 2:
            msg = (
                f"{seen} of {len(self.held_out)} held-out images are in the batches of an epoch, and statistics need "
                "two. Give a loader that has every image once (no drop_last), smaller batches, or more images."
            )
            raise ValueError(msg)
        sizes = sorted({tuple(image.shape[-2:]) for image in kept.values()})
        if len(sizes) > 1:
            msg = (
                f"images: {sizes[0]} and {sizes[-1]} reach the model, and KdMultiresolutionDual compares images of one "
                "size. Leave pre_processor out, or put a Resize to height and width into it."
            )
            raise ValueError(msg)

    def _check_held_out(self) -> None:
        """Check that the cloners have not learnt from the held-out images before."""
        if self.names_before is not None and self.names_before != self.names:
            msg = (
                f"The training that is resumed held out other images than seed={self.seed} chooses of these, from some "
                "of which its cloners have learnt. Resume with its seed and its training images, or train anew."
            )
            raise ValueError(msg)

    @property
    def names(self) -> list[str]:
        """Names of the held-out images' files, which a checkpoint keeps: their folder may be moved."""
        return sorted(Path(path).name for path in self.held_out)

    def calibrate(self, reduce: Reduce) -> Calibration | None:
        """Do as :func:`calibrate` with the held-out images, but where that was done with the same weights.

        Args:
            reduce: sums over all processes.

        Returns:
            What :func:`calibrate` does; ``None`` if nothing was to be done, or no training is under way.
        """
        if not self._normal:
            return None
        mark = mark_of(nn.ModuleList([self.model.local_cloner, self.model.global_cloner]))
        if mark == self._calibrated:
            return None
        calibration = calibrate(
            self.model, self._normal, blurred=self._blurred, defective=self._defective, image_size=self.image_size,
            image_score=self.image_score, reduce=reduce, precision=self._precision,
        )  # fmt: skip
        self._calibrated, self._judgement = mark, calibration.judgement
        return calibration

    def end(self) -> None:
        """Free the held-out images' features, and say in the log how images are judged now, if that is known."""
        if self._judgement:
            rank_zero_only(logger.info)(self._judgement)
        self._calibrated, self._judgement = None, ""
        self._normal, self._blurred, self._defective = [], [], []

    def fitted(self, paths: Sequence[str]) -> list[int]:
        """Return the indices of those images that the cloners learn from: of all that are not held out."""
        return [index for index, path in enumerate(paths) if path not in self.held_out]


class CalibratedEvaluation(Callback):
    """Lets whoever looks at the model on the way of a training see it calibrated, and lets go of it when that ends."""

    def __init__(self) -> None:
        self._handle: RemovableHandle | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have the model calibrated before each of its evaluations."""
        del trainer
        module = cast("Any", pl_module)
        self._handle = module.model.register_forward_pre_hook(
            lambda model, _: None if model.training else module.calibrate()
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the model alone."""
        del trainer, pl_module
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Calibrate the model to its last weights, for whoever saves or uses them, and leave it alone."""
        del exception
        self.on_train_end(trainer, pl_module)
        module = cast("Any", pl_module)
        if trainer.world_size == 1:  # of several processes the others may be gone
            try:
                module.calibrate()
            except Exception as error:  # what has ended the training may stand in the way of this, too
                logger.warning("The model is not calibrated to its last weights (%s).", error)
        module.held_out.end()
