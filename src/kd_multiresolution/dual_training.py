"""Training of the dual variant: images held out, squared error, one cycle of the rate, and what is normal.

How much each family of maps counts is told from the held-out images as well: as they are, out of focus, and with
painted defects.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import zip_longest
from pathlib import Path
from typing import Literal, cast, get_args

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim.lr_scheduler import OneCycleLR

from kd_multiresolution.dual import ChannelError, DualModel, top_mean
from kd_multiresolution.finite import check_finite
from kd_multiresolution.optimizer import Muon
from kd_multiresolution.painted_defects import out_of_focus, painted
from kd_multiresolution.post_processor import NormalScores

IMAGE_SIZE = (256, 256)
LEARNING_RATE = 4e-3  # the highest
WEIGHT_DECAY = 1.0
HELD_OUT_FRACTION = 8  # one of so many normal images
MOST_HELD_OUT = 64
FEWEST_HELD_OUT = 4
FEWEST_IMAGES = 4
STEPS = 1400  # of training, where nobody gives a number of epochs
LOCAL_SHARE = 4  # the local cloner learns from one in so many images: each has many positions, which it sees one by one
PAINTED = 64  # pictures with a painted defect, or as many as there are held-out images
LARGEST_GAIN = 5.0  # deviations: a defect that nobody can miss says nothing about others
NOTICEABLE_GAIN = 0.6  # deviations: 1.1 and more on industrial parts, at most 0.48 on CIFAR-10 and medical images
FEWEST_TO_JUDGE_BY = 8  # held-out images; the deviation of fewer says too little, and they are judged by their defects
CHUNK = 16  # held-out images at a time

logger = logging.getLogger(__name__)

ImageScore = Literal["auto", "defects", "whole"]

Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all processes."""

Precision = Callable[[], AbstractContextManager[None]]
"""Makes the context in which networks compute."""

Predicted = tuple[Sequence[Tensor], list[Tensor], list[Tensor]]
"""The source's features of some images, the local cloner's and the global cloner's prediction of all but the first."""


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
            f"{len(ordered)} training images: variant='dual' trains on some and takes its statistics from others, at "
            f"least two of each. Give it {FEWEST_IMAGES} or more, or use variant='paper'."
        )
        raise ValueError(msg)
    count = min(max(len(ordered) // HELD_OUT_FRACTION, min(len(ordered) // 2, FEWEST_HELD_OUT)), MOST_HELD_OUT)
    order = torch.randperm(len(ordered), generator=torch.Generator().manual_seed(seed)).tolist()
    return frozenset(ordered[i] for i in order[:count])


def check_dual_training(image_score: str, learning_rate: float) -> None:
    """Check what decides the training of the dual variant.

    Raises:
        ValueError: if there is no such image score, or the rate is too high for the weight decay.
    """
    if image_score not in get_args(ImageScore):
        msg = f"image_score={image_score!r}: expected one of {', '.join(get_args(ImageScore))}."
        raise ValueError(msg)
    if learning_rate * WEIGHT_DECAY >= 1:
        msg = f"learning_rate={learning_rate:g}: variant='dual' takes less than {1 / WEIGHT_DECAY:g}, like 4e-3."
        raise ValueError(msg)


class DualTraining:
    """What happens to the dual model while it is trained; Lightning's hooks call it.

    Args:
        model: what is trained.
        seed: of the choice of held-out images.
        image_score: images are judged by their ``defects``, as a ``whole``, or, if ``auto``, as held-out images say.
    """

    def __init__(self, model: DualModel, seed: int, image_score: ImageScore = "auto") -> None:
        self.model = model
        self.seed = seed
        self.image_score = image_score
        self.held_out: frozenset[str] = frozenset()
        self.held_out_before: list[str] | None = None
        self.calibrated_after = -1
        self._precision: Precision = nullcontext
        self.image_size = IMAGE_SIZE
        self._normal: list[Tensor] = []
        self._blurred: list[Tensor] = []
        self._defective: list[Tensor] = []

    @staticmethod
    def epochs(trainer: Trainer) -> int:
        """Return how many epochs make the default number of steps; the trainer has a limit of epochs."""
        return math.ceil(STEPS * (trainer.max_epochs or 1) / trainer.estimated_stepping_batches)

    def optimizers(self, trainer: Trainer, learning_rate: float) -> OptimizerLRSchedulerConfig:
        """Return Muon over both cloners and one cycle of its rate over all steps.

        Raises:
            ValueError: if nothing says how many steps there are.
        """
        steps = trainer.estimated_stepping_batches
        if steps == float("inf"):
            msg = (
                "variant='dual' has a rate that falls to zero with the last step: give epochs, max_epochs or max_steps."
            )
            raise ValueError(msg)
        parameters = [*self.model.local_cloner.parameters(), *self.model.global_cloner.parameters()]
        optimizer = Muon(parameters, learning_rate, weight_decay=WEIGHT_DECAY)
        cycle = OneCycleLR(optimizer, learning_rate, total_steps=int(steps), cycle_momentum=False)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}

    def start(
        self,
        paths: Sequence[str],
        batches: Iterable[tuple[Sequence[str], Tensor, list[Tensor]]],
        reduce: Reduce,
        *,
        resumed: bool,
        precision: Precision = nullcontext,
    ) -> None:
        """Choose the held-out images, keep their features, and standardise by the others' unless that was done before.

        Features are kept of each image as it is, out of focus, and with painted defects.

        Args:
            paths: of all training images.
            batches: paths, images and source features of this process's training images.
            reduce: sums over all processes.
            resumed: whether this training goes on with another.
            precision: in which the features of the batches were computed, and predictions of them are.

        Raises:
            ValueError: if there are fewer than four images, one of them is not finite, or a resumed training held out
                others.
        """
        self._precision = precision
        self.held_out = held_out_images(paths, self.seed)
        if resumed:
            self._check_held_out()
        moments = ChannelMoments()
        kept: dict[str, list[Tensor]] = {}
        # The global random generator decides the order of the images; a look ahead must not change it.
        with torch.random.fork_rng():
            for batch_paths, images, features in batches:
                check_finite(images, batch_paths)
                for i, path in enumerate(batch_paths):
                    if path in self.held_out:
                        kept[path] = [images[i].clone(), *(level[i].clone() for level in features)]
                fitted = self.fitted(batch_paths)
                moments.add([level[fitted] for level in features])
                empty = [images[:0], *(level[:0] for level in features)]
        # In the order of their paths, on which the last digits of sums depend.
        rows = [kept[path] for path in sorted(kept)]
        held_out, *self._normal = [torch.stack(column) for column in zip(*rows, strict=True)] if rows else empty
        self.image_size = (held_out.shape[-2], held_out.shape[-1])
        generator = torch.Generator().manual_seed(self.seed)
        copies = max(PAINTED // len(self.held_out), 1)  # however many of them this process has
        self._defective = self._features(torch.cat([painted(held_out, generator) for _ in range(copies)]))
        self._blurred = self._features(out_of_focus(held_out))
        if not resumed:
            moments.standardize(self.model, reduce)

    def _features(self, images: Tensor) -> list[Tensor]:
        """Return the source's features of the images."""
        with torch.no_grad(), self._precision():
            features = [
                self.model.source(chunk.contiguous(memory_format=torch.channels_last))
                for chunk in torch.split(images, CHUNK)
            ]
        return [torch.cat(level).to(images.dtype) for level in zip(*features, strict=True)]

    def _check_held_out(self) -> None:
        """Check that the cloners have not learnt from the held-out images before."""
        if self.held_out_before is not None and self.held_out_before != self.held_out_names:
            msg = (
                f"The training that is resumed held out other images than seed={self.seed} chooses of these, from some "
                "of which its cloners have learnt. Resume with its seed and its training images, or train anew."
            )
            raise ValueError(msg)

    @property
    def held_out_names(self) -> list[str]:
        """Names of the held-out images' files, which a checkpoint keeps: their folder may be moved."""
        return sorted(Path(path).name for path in self.held_out)

    @staticmethod
    def check_cycle(cycle: OneCycleLR, trainer: Trainer, learning_rate: float) -> None:
        """Check that the rate's cycle is that of this training; a resumed one has it from its checkpoint.

        Raises:
            ValueError: if it has another length, or another rate.
        """
        steps, highest = trainer.estimated_stepping_batches, cycle.optimizer.param_groups[0]["max_lr"]
        for name, given, begun in (
            ("steps", steps, cycle.total_steps), ("learning_rate", learning_rate, highest),
        ):  # fmt: skip
            if given != begun:
                msg = (
                    f"{name}={given:g}: the training that is resumed began with {begun:g}, and variant='dual' goes "
                    "through one cycle of its rate. Resume it with the same epochs, batches and learning_rate, or "
                    "train anew."
                )
                raise ValueError(msg)

    def calibrate(self, step: int, reduce: Reduce) -> tuple[NormalScores, NormalScores] | None:
        """Do as :func:`calibrate` with the held-out images, but where that was done after the same step.

        Args:
            step: how many steps the training has taken.
            reduce: sums over all processes.

        Returns:
            As :func:`calibrate`; ``None`` if nothing was to be done, or no training is under way.
        """
        if step == self.calibrated_after or not self._normal:
            return None
        self.calibrated_after = step
        return calibrate(
            self.model, self._normal, blurred=self._blurred, defective=self._defective, image_size=self.image_size,
            image_score=self.image_score, reduce=reduce, precision=self._precision,
        )  # fmt: skip

    def end(self) -> None:
        """Free the held-out images' features."""
        self.calibrated_after = -1
        self._normal, self._blurred, self._defective = [], [], []

    def fitted(self, paths: Sequence[str]) -> list[int]:
        """Return the indices of those images that the cloners learn from: of all that are not held out."""
        return [index for index, path in enumerate(paths) if path not in self.held_out]


class ChannelMoments:
    """Sums over images and positions of each channel of each critical point, for mean and deviation."""

    def __init__(self) -> None:
        self.sums: list[Tensor] = []

    def add(self, features: Sequence[Tensor]) -> None:
        """Add the features of some images, one (N, C_i, H_i, W_i) tensor per critical point."""
        sums = []
        for level in features:
            wide = level.double()
            count = torch.full((level.shape[1],), level.numel() / level.shape[1], device=level.device).double()
            sums.append(torch.stack([count, wide.sum((0, 2, 3)), wide.square().sum((0, 2, 3))]))
        self.sums = [a + b for a, b in zip(self.sums, sums, strict=True)] if self.sums else sums

    def standardize(self, model: DualModel, reduce: Reduce) -> None:
        """Set the model's units of each level."""
        for units, sums in zip(model.levels_units, self.sums, strict=True):
            count, total, squares = reduce(sums)
            units.set(total / count, squares / count)


def dual_losses(model: DualModel, features: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the mean squared error of either cloner on standardised features, summed over the predicted levels.

    The local cloner's is that of the first quarter of the images, a random one, rounded up.

    Args:
        model: the model; gradients reach its cloners.
        features: the source's, (N, C_i, H_i, W_i) per critical point.
    """
    some = [level[: -(-len(level) // LOCAL_SHARE)] for level in features]
    cloners = {"local": (model.local_cloner, some), "global": (model.global_cloner, features)}
    losses = {}
    for name, (cloner, targets) in cloners.items():
        levels = zip(targets[1:], cloner(targets, model.levels_units), model.levels_units[1:], strict=True)
        losses[name] = torch.stack(
            [_mean_square((ours - source) * (1 / units.deviation)[:, None, None]) for source, ours, units in levels]
        ).sum()
    return losses


def _mean_square(difference: Tensor) -> Tensor:
    # A norm reads the numbers once, and its gradient is made in one pass, too: half the time of square and mean.
    root: Tensor = torch.linalg.vector_norm(difference) / difference.numel() ** 0.5
    return root.square()


@torch.no_grad()
def calibrate(
    model: DualModel,
    normal: Sequence[Tensor],
    *,
    blurred: Sequence[Tensor],
    defective: Sequence[Tensor],
    image_size: tuple[int, int],
    image_score: ImageScore,
    reduce: Reduce,
    precision: Precision = nullcontext,
) -> tuple[NormalScores, NormalScores]:
    """Set from held-out normal images what the model compares with, and how it judges.

    That is the error per channel, the weight of each map, and whether images are judged as a whole; if ``image_score``
    leaves that open, where a painted defect raises the mean of no map by a noticeable part of what it differs by among
    normal images.

    Args:
        model: its cloners as they are.
        normal: features of this process's held-out images, (N, C_i, H_i, W_i) per critical point; N may be 0.
        blurred: of the same images out of focus.
        defective: of the same images with painted defects, all of them once, then all of them again, and so on.
        image_size: height and width of the images in pixels.
        image_score: as of :class:`DualTraining`.
        reduce: sums over all processes.
        precision: in which the cloners predict.

    Returns:
        How the scores of normal images, and the largest values of their maps, are distributed.
    """
    predicted = _predicted(model, normal, precision)
    _weigh_channels(model, predicted, reduce)
    normal_maps = _maps(model, predicted)
    blurred_maps, defective_maps = (
        _maps(model, _predicted(model, features, precision)) for features in (blurred, defective)
    )
    normal_tops, blurred_tops, defective_tops = (
        top_mean(model.blurred(maps)) for maps in (normal_maps, blurred_maps, defective_maps)
    )
    _weigh_families(model, normal_tops, blurred_tops, defective_tops, reduce)
    normal_means, defective_means = (
        maps[:, : model.fine].double().mean((2, 3)) for maps in (normal_maps, defective_maps)
    )
    auto = image_score == "auto"
    as_whole = _differ_as_a_whole(normal_means, defective_means, reduce) if auto else image_score == "whole"
    model.judged_as_whole.fill_(as_whole)
    whole = torch.cat([model.as_a_whole(features, local) for features, local, _ in predicted])
    read = model.read(normal_maps, whole, image_size)
    peaks = cast("Tensor", read.anomaly_map).flatten(1).amax(1)
    return _distribution(cast("Tensor", read.pred_score), reduce), _distribution(peaks, reduce)


def _predicted(model: DualModel, features: Sequence[Tensor], precision: Precision) -> list[Predicted]:
    """Return the features of a few images at a time, with what the local and the global cloner predict of them."""
    chunks = zip(*(torch.split(level, CHUNK) for level in features), strict=True)
    with precision():
        return [(chunk, *model.predictions(chunk)) for chunk in chunks]


def _maps(model: DualModel, predicted: Iterable[Predicted]) -> Tensor:
    """Return all families of maps of some images, (N, K, H, W)."""
    return torch.cat([model.families(*part) for part in predicted])


def _distribution(scores: Tensor, reduce: Reduce) -> NormalScores:
    mean, deviation, count = mean_and_deviation(scores[:, None], reduce)
    return NormalScores(float(mean), float(deviation), count)


def gains(normal: Tensor, defective: Tensor, harmless: Tensor, reduce: Reduce) -> tuple[Tensor, Tensor]:
    """Return by how much painted defects raise each map's value, and the deviation in which that is measured.

    A map's *gain* is by how many deviations of its values on harmless images a defect raises its value on the same
    image, between -5 and 5, on average.

    Args:
        normal: (N, K), value of each map on each normal image.
        defective: (M, K), M a multiple of N: on the same images with painted defects.
        harmless: (L, K), on images without a defect.
        reduce: sums over all processes.

    Returns:
        Gains and deviations, (K,) each, the deviations above zero.
    """
    normal, defective = normal.double(), defective.double()
    _, deviation, _ = mean_and_deviation(harmless.double(), reduce)
    deviation = deviation.clamp_min(torch.finfo(torch.float32).eps)
    raised = (defective - normal.repeat(len(defective) // max(len(normal), 1), 1)) / deviation
    sums = torch.cat([raised.clamp(-LARGEST_GAIN, LARGEST_GAIN).sum(0), raised.new_tensor([len(raised)])])
    *totals, count = reduce(sums).unbind()
    return torch.stack(totals) / count, deviation


def _weigh_families(model: DualModel, normal: Tensor, blurred: Tensor, defective: Tensor, reduce: Reduce) -> None:
    """Let each map count, per deviation, by the cube of its gain over images in and out of focus.

    A linear discriminant of independent maps would take the gain itself, but the maps find the same defects, and the
    better ones should lead. The values are (N, K), (N, K) and (M, K); the weights of the model are set.
    """
    gain, deviation = gains(normal, defective, torch.cat([normal, blurred]), reduce)
    share = gain.clamp_min(0).pow(3)
    # Maps that no defect raises cannot be told apart, as with random weights: they count alike.
    share = torch.where(share.sum() > 0, share / share.sum(), 1 / len(share))
    # The weight of a map that hardly varies must still be a number of the model's type.
    model.family_weight.copy_(share / deviation.clamp_min(torch.finfo(model.family_weight.dtype).eps))


def _differ_as_a_whole(normal: Tensor, defective: Tensor, reduce: Reduce) -> bool:
    """Return whether defects raise the mean of no map noticeably, and say so in the log.

    Args:
        normal: (N, K), mean of each map on each normal image.
        defective: (M, K), on the same images with painted defects.
        reduce: sums over all processes.
    """
    gain = float(gains(normal, defective, normal, reduce)[0].max())
    count = int(reduce(torch.tensor(float(len(normal)), device=normal.device)))
    if count < FEWEST_TO_JUDGE_BY:
        found, why = False, f"{count} held-out images are too few to tell"
    else:
        found, why = gain < NOTICEABLE_GAIN, f"a painted defect raises the mean of a map by {gain:.2f} deviations"
    rank_zero_only(logger.info)(
        "Images are judged %s: %s.", "as a whole" if found else "by their defects", why, stacklevel=2
    )
    return found


def _weigh_channels(model: DualModel, predicted: Sequence[Predicted], reduce: Reduce) -> None:
    """Set the mean squared difference of each channel."""
    errors = zip_longest(model.value, model.disagreement)  # the last level has no value
    for level, (value, disagreement) in enumerate(cast("Iterable[tuple[ChannelError | None, ChannelError]]", errors)):
        channels = disagreement.root_mean_square
        sums = channels.new_zeros(3, len(channels), dtype=torch.float64)
        for chunk, local, overall in predicted:
            source = chunk[level + 1]
            sums[0] += source.numel() / source.shape[1]
            sums[1] += (source - local[level]).double().square().sum((0, 2, 3))
            sums[2] += (local[level] - overall[level]).double().square().sum((0, 2, 3))
        count, values, disagreements = reduce(sums)
        disagreement.set(disagreements / count)
        if value is not None:
            value.set(values / count)


def mean_and_deviation(rows: Tensor, reduce: Reduce) -> tuple[Tensor, Tensor, int]:
    """Return mean and sample standard deviation over the rows of all processes, and their number.

    Args:
        rows: (N, K), this process's.
        reduce: sums over all processes.
    """
    wide = rows.double()
    count = int(reduce(torch.tensor(float(len(rows)), device=rows.device)))
    mean = reduce(wide.sum(0)) / count
    variance = reduce((wide - mean).square().sum(0)) / (count - 1)
    return mean.to(rows), variance.sqrt().to(rows), count
