"""What is normal to trained cloners, and how much each map counts, told from held-out normal images.

The images are read as they are, out of focus, and with painted defects (see ``docs/method.md``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import zip_longest
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from kd_multiresolution.dual.maps import ChannelError, top_mean
from kd_multiresolution.dual.torch_model import KdMultiresolutionDualModel
from kd_multiresolution.plugin.post_processor import NormalScores
from kd_multiresolution.source.channel_moments import Reduce, exact

LARGEST_GAIN = 5.0  # deviations: a defect that nobody can miss says nothing about others
# Deviations: below, a gain is chance. A patch of a texture pasted into the same texture is hardly a defect.
LEAST_GAIN = 0.25
# Deviations from the mean, beyond which a harmless image counts as no further away; how often that is told anew; and
# what is left of a normal distribution's deviation then.
FURTHEST, ROUNDS, LEFT_OF_NORMAL = 2.0, 10, 0.948
SMALLEST = torch.finfo(torch.float32).eps  # deviation, of a map that does not vary
# Deviations by which a painted defect raises the cloners' disagreement (1.5 and more on parts, at most 0.5 on images of
# one class), or the mean of a map.
NOTICEABLE_GAIN, NOTICEABLE_IN_MEAN = 0.85, 1.0
FEWEST_TO_JUDGE_BY = 8  # held-out images; the deviation of fewer says too little, and they are judged by their defects
# Of the mean: scores that deviate by less are one number but for the last digit, which differs with the batch's size.
LEAST_DEVIATION = 1e-4
CHUNK = 16  # held-out images at a time

ImageScore = Literal["auto", "defects", "whole"]

Precision = Callable[[], AbstractContextManager[None]]
"""Makes the context in which networks compute."""

Predicted = tuple[Sequence[Tensor], list[Tensor], list[Tensor]]
"""The source's features of some images, the local cloner's and the global cloner's prediction of all but the first."""


class Calibration(NamedTuple):
    """What held-out normal images say.

    Attributes:
        scores: how their scores are distributed.
        peaks: how the largest values of their maps are.
        judgement: how images are judged, and why, in words.
    """

    scores: NormalScores
    peaks: NormalScores
    judgement: str


@torch.no_grad()
def calibrate(
    model: KdMultiresolutionDualModel,
    normal: Sequence[Tensor],
    *,
    blurred: Sequence[Tensor],
    defective: Sequence[Tensor],
    image_size: tuple[int, int],
    image_score: ImageScore,
    reduce: Reduce,
    precision: Precision = nullcontext,
) -> Calibration:
    """Set from held-out normal images what the model compares with, and how it judges.

    That is the error per channel, the weight of each map and of the positions, and whether images are judged as a
    whole; if ``image_score`` leaves that open, where a painted defect neither raises the cloners' disagreement
    noticeably, so that the global cloner knows what such images look like, nor the mean of a map, in which images of
    one texture are alike.

    Args:
        model: its cloners as they are.
        normal: features of this process's held-out images, (N, C_i, H_i, W_i) per critical point; N may be 0.
        blurred: of the same images out of focus.
        defective: of the same images with painted defects, all of them once, then all of them again, and so on.
        image_size: height and width of the images in pixels.
        image_score: ``auto``, ``defects`` or ``whole``.
        reduce: sums over all processes.
        precision: in which the cloners predict.

    Returns:
        How scores and maps of the normal images are distributed, and how images are judged.
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
    positions = [model.positions(features) for features in (normal, blurred, defective)]
    kinds = zip((normal_maps, blurred_maps, defective_maps), positions, strict=True)
    _weigh_positions(model, *(torch.stack(model.tops(*kind), 1) for kind in kinds), reduce=reduce)
    whole, why = image_score == "whole", f"{image_score=}"
    if image_score == "auto":
        # In plain deviations: images of one class are of several kinds, and the rare ones belong to it.
        _, deviation, _ = mean_and_deviation(exact(torch.cat([normal_tops, blurred_tops])), reduce)
        of_tops = gains(normal_tops, defective_tops, deviation, reduce)
        of_disagreement = of_tops[[name == "disagreement" for name in model.maps]].max()
        normal_means, defective_means = (
            exact(maps[:, : model.fine]).mean((2, 3)) for maps in (normal_maps, defective_maps)
        )
        _, deviation, count = mean_and_deviation(normal_means, reduce)
        of_means = gains(normal_means, defective_means, deviation, reduce).max()
        whole, why = _differ_as_a_whole(float(of_disagreement), float(of_means), int(count))
    model.judged_as_whole.fill_(whole)
    of_images = torch.cat([model.as_a_whole(features, local) for features, local, _ in predicted])
    read = model.read(normal_maps, positions[0], of_images, image_size)
    peaks = cast("Tensor", read.anomaly_map).flatten(1).amax(1)
    judgement = f"Images are judged {'as a whole' if whole else 'by their defects'}: {why}."
    return Calibration(_distribution(cast("Tensor", read.pred_score), reduce), _distribution(peaks, reduce), judgement)


def _predicted(model: KdMultiresolutionDualModel, features: Sequence[Tensor], precision: Precision) -> list[Predicted]:
    """Return the features of a few images at a time, with what the local and the global cloner predict of them."""
    chunks = zip(*(torch.split(level, CHUNK) for level in features), strict=True)
    with precision():
        return [(chunk, *model.predictions(chunk)) for chunk in chunks]


def _maps(model: KdMultiresolutionDualModel, predicted: Iterable[Predicted]) -> Tensor:
    """Return all families of maps of some images, (N, K, H, W)."""
    return torch.cat([model.families(*part) for part in predicted])


def _distribution(scores: Tensor, reduce: Reduce) -> NormalScores:
    mean, deviation, count = mean_and_deviation(scores[:, None], reduce)
    deviation = torch.maximum(deviation, LEAST_DEVIATION * mean.abs())
    return NormalScores(float(mean), float(deviation), int(count), tuple(scores.tolist()))


def gains(normal: Tensor, defective: Tensor, deviation: Tensor, reduce: Reduce) -> Tensor:
    """Return by how much painted defects raise each map's value.

    A map's *gain* is by how many deviations a defect raises its value on the same image, between -5 and 5, on average.

    Args:
        normal: (N, K), value of each map on each normal image.
        defective: (M, K), M a multiple of N: on the same images with painted defects.
        deviation: (K,), of each map's values on images without a defect.
        reduce: sums over all processes.

    Returns:
        (K,).
    """
    normal, defective = exact(normal), exact(defective)
    deviation = exact(deviation).clamp_min(SMALLEST)
    raised = (defective - normal.repeat(len(defective) // max(len(normal), 1), 1)) / deviation
    sums = torch.cat([raised.clamp(-LARGEST_GAIN, LARGEST_GAIN).sum(0), raised.new_tensor([len(raised)])])
    *totals, count = reduce(sums).unbind()
    return torch.stack(totals) / count


def shares(gains: Tensor) -> Tensor:
    """Return how much each of several maps counts, (K,), 1 in all: by the cube of its gain, (K,), >= 0, not all 0.

    A linear discriminant of independent maps would take the gain itself, but the maps find the same defects, and the
    better ones should lead.
    """
    cubes = gains.pow(3)
    return cubes / cubes.sum()


def deviation_of_most(rows: Tensor, reduce: Reduce) -> Tensor:
    """Return the deviation of columns of numbers of all processes, over which a single outlier has little hold.

    Of some dozens of images, one that is unlike the others would otherwise decide. Numbers beyond two deviations from
    the mean count as if they were no further away, and both are told anew of what that leaves; of a normal
    distribution's numbers it is the standard deviation.

    Args:
        rows: (N, K), this process's.
        reduce: sums over all processes.

    Returns:
        (K,), >= 0.
    """
    rows = exact(rows)
    mean, deviation, _ = mean_and_deviation(rows, reduce)
    for _ in range(ROUNDS):
        reach = FURTHEST * deviation
        mean, deviation, _ = mean_and_deviation(rows.clamp(mean - reach, mean + reach), reduce)
    return deviation / LEFT_OF_NORMAL


def _weigh_families(
    model: KdMultiresolutionDualModel, normal: Tensor, blurred: Tensor, defective: Tensor, reduce: Reduce
) -> None:
    """Let each map count by its gain over images in and out of focus.

    In the score that is per deviation, by which images are told apart; in the anomaly map per mean, which makes maps
    alike where nothing is wrong. The values are (N, K), (N, K) and (M, K).
    """
    deviation = deviation_of_most(torch.cat([normal, blurred]), reduce).clamp_min(SMALLEST)
    mean, _, _ = mean_and_deviation(exact(normal), reduce)
    # The weight of a map that hardly varies, or is always zero, must still be a number of the model's type.
    units = torch.stack([mean, deviation]).clamp_min(torch.finfo(model.family_weight.dtype).eps)
    # Maps that defects raise by no more than chance cannot be told apart, and count alike.
    share = shares(gains(normal, defective, deviation, reduce).clamp_min(LEAST_GAIN))
    model.family_weight.copy_(share / units)


def _weigh_positions(
    model: KdMultiresolutionDualModel, normal: Tensor, blurred: Tensor, defective: Tensor, *, reduce: Reduce
) -> None:
    """Let both parts of a score count by their gains, per deviation, as each map does in the first.

    The values are those of the maps' sum and of the positions, (N, 2), (N, 2) and (M, 2).
    """
    deviation = deviation_of_most(torch.cat([normal, blurred]), reduce).clamp_min(SMALLEST)
    of_maps, of_positions = gains(normal, defective, deviation, reduce)
    # Where defects raise the positions by no more than chance, as in a texture, nothing has a place of its own.
    gain = torch.stack([of_maps.clamp_min(LEAST_GAIN), F.threshold(of_positions, LEAST_GAIN, 0)])
    of_maps, of_positions = shares(gain) / deviation
    largest = torch.finfo(model.family_weight.dtype).max / 2  # a score is twice a mean of both parts
    model.family_weight[1].copy_((exact(model.family_weight[1]) * of_maps).clamp_max(largest))
    model.position_weight.copy_(of_positions.clamp_max(largest))


def _differ_as_a_whole(of_disagreement: float, of_means: float, count: int) -> tuple[bool, str]:
    """Return whether painted defects are lost in what normal images differ by, and why.

    Args:
        of_disagreement: highest gain of the cloners' disagreement.
        of_means: highest gain of a map's mean.
        count: how many held-out images there are.
    """
    if count < FEWEST_TO_JUDGE_BY:
        return False, f"{count} held-out images are too few to tell"
    return of_disagreement < NOTICEABLE_GAIN and of_means < NOTICEABLE_IN_MEAN, (
        f"a painted defect raises the cloners' disagreement by {of_disagreement:.2f} deviations (less than "
        f"{NOTICEABLE_GAIN} is little), the mean of a map by {of_means:.2f} (less than {NOTICEABLE_IN_MEAN})"
    )


def _weigh_channels(model: KdMultiresolutionDualModel, predicted: Sequence[Predicted], reduce: Reduce) -> None:
    """Set the mean squared difference of each channel."""
    errors = zip_longest(model.value, model.disagreement)  # the last level has no value
    for level, (value, disagreement) in enumerate(cast("Iterable[tuple[ChannelError | None, ChannelError]]", errors)):
        channels = disagreement.root_mean_square
        sums = exact(channels).new_zeros(3, len(channels))
        for chunk, local, overall in predicted:
            source = chunk[level + 1]
            sums[0] += source.numel() / source.shape[1]
            sums[1] += exact(source - local[level]).square().sum((0, 2, 3))
            sums[2] += exact(local[level] - overall[level]).square().sum((0, 2, 3))
        count, values, disagreements = reduce(sums)
        disagreement.set(disagreements / count)
        if value is not None:
            value.set(values / count)


def mean_and_deviation(rows: Tensor, reduce: Reduce) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and sample standard deviation over the rows of all processes, (K,), and their number, ().

    Args:
        rows: (N, K), this process's.
        reduce: sums over all processes.
    """
    wide = exact(rows)
    count = reduce(wide.new_full((), len(rows)))  # as a number it would make the host wait for a GPU
    mean = reduce(wide.sum(0)) / count
    variance = reduce((wide - mean).square().sum(0)) / (count - 1)
    return mean.to(rows), variance.sqrt().to(rows), count
