"""Which images are held out, and what is kept of them."""

from __future__ import annotations

import pytest
import torch

from kd_multiresolution.dual.calibration import calibrate
from kd_multiresolution.dual.held_out import PAINTED, HeldOutImages, held_out_images
from kd_multiresolution.dual.painted_defects import out_of_focus, painted
from kd_multiresolution.dual.torch_model import KdMultiresolutionDualModel
from tests.dual.calibrated import SIZE, alone, pictures


def test_held_out_images() -> None:
    paths = [f"{i}.png" for i in range(80)]
    chosen = held_out_images(paths, seed=0)
    assert len(chosen) == 10
    assert chosen == held_out_images(reversed(paths), seed=0)
    assert chosen != held_out_images(paths, seed=1)
    assert [len(held_out_images(paths[:count], seed=0)) for count in (4, 8, 32, 40)] == [2, 4, 4, 5]
    assert len(held_out_images([str(i) for i in range(5000)], seed=0)) == 64


def test_a_training_says_once_how_images_are_judged(caplog: pytest.LogCaptureFixture) -> None:
    model, images = KdMultiresolutionDualModel("small_vgg"), pictures(8)
    training = HeldOutImages(model, seed=0)
    training.start(
        [f"{i}.png" for i in range(8)],
        [([f"{i}.png" for i in range(8)], images, model.source(images))],
        alone,
        resumed=False,
    )
    with caplog.at_level("INFO"):
        for _ in range(2):
            torch.nn.init.normal_(next(model.local_cloner.parameters()))
            assert training.calibrate(alone) is not None
        assert caplog.messages == []
        training.end()
        training.end()
    assert caplog.messages == ["Images are judged by their defects: 4 held-out images are too few to tell."]


def test_held_out_images_that_never_come_or_have_several_sizes_are_refused() -> None:
    model, images = KdMultiresolutionDualModel("small_vgg"), pictures(8)
    paths = [f"{i}.png" for i in range(8)]
    held_out = held_out_images(paths, seed=0)
    rest = [i for i, path in enumerate(paths) if path not in held_out]
    batch = ([paths[i] for i in rest], images[rest], model.source(images[rest]))
    with pytest.raises(ValueError, match="0 of 4 held-out images are in the batches of an epoch"):
        HeldOutImages(model, seed=0).start(paths, [batch], alone, resumed=False)
    batches = [
        ([path], picture[None], model.source(picture[None])) for path, picture in zip(paths, images, strict=True)
    ]
    small = images[:1, :, :32, :32]
    name = sorted(held_out)[0]
    batches[paths.index(name)] = ([name], small, model.source(small))
    with pytest.raises(ValueError, match=r"images: \(32, 32\) and \(64, 96\) reach the model"):
        HeldOutImages(model, seed=0).start(paths, batches, alone, resumed=False)


def test_training_looks_at_its_held_out_images_out_of_focus_and_with_defects() -> None:
    """A process that holds none of them has nothing to look at, and takes the sums of the others."""
    model, images = KdMultiresolutionDualModel("small_vgg"), pictures(8)
    paths = [f"{i}.png" for i in range(len(images))]
    features = model.source(images)
    training = HeldOutImages(model, seed=0)
    training.start(paths, [(paths, images, features)], alone, resumed=False)
    held_out = [i for i, path in enumerate(paths) if path in training.held_out]
    assert len(held_out) == 4
    for units, level in zip(model.levels_units, features, strict=True):
        fitted = level[[i for i in range(len(paths)) if i not in held_out]]
        torch.testing.assert_close(units.mean, fitted.mean((0, 2, 3)), msg="held-out images have no part in it")
    generator = torch.Generator().manual_seed(0)
    copies = [painted(images[held_out], generator) for _ in range(PAINTED // len(held_out))]
    assert training.calibrate(alone) is not None
    assert training.calibrate(alone) is None, "nothing has changed since"
    weight = model.family_weight.clone()
    calibrate(
        model, [level[held_out] for level in features], blurred=model.source(out_of_focus(images[held_out])),
        defective=model.source(torch.cat(copies)), image_size=SIZE, image_score="auto", reduce=alone,
    )  # fmt: skip
    torch.testing.assert_close(model.family_weight, weight, rtol=1e-4, atol=1e-4)
    calibrate(
        model, [level[held_out] for level in features], blurred=[level[held_out] for level in features],
        defective=model.source(torch.cat(copies)), image_size=SIZE, image_score="auto", reduce=alone,
    )  # fmt: skip
    assert not model.family_weight.allclose(weight, rtol=1e-2), "the blur counts"
    rest = [i for i in range(len(paths)) if i not in held_out]
    batch = ([paths[i] for i in rest], images[rest], [level[rest] for level in features])
    training.start(paths, [batch], lambda tensor: tensor + 2, resumed=False)
    calibration = training.calibrate(lambda tensor: tensor + 2)
    assert calibration is not None
    assert calibration.scores.count == 2
