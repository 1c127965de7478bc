"""One row, one bad argument: each is refused by name, before any work is done."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from anomalib.cli.cli import AnomalibCLI
from anomalib.models import AnomalibModule
from omegaconf import ListConfig

from kd_multiresolution import KdMultiresolution, KdMultiresolutionDual, KdMultiresolutionModel
from kd_multiresolution.data import BrainMRI, HeadCT, OneClassCIFAR10, OneClassFolder, RetinalOCT, TextureDefects
from kd_multiresolution.dual.torch_model import KdMultiresolutionDualModel
from kd_multiresolution.plugin.arguments import check_types

NAN, INF = float("nan"), float("inf")
WRONG_TYPE = r"={value}: expected .*, not {type}\."

# By argument: values of another type, and values out of range with what the message must say.
BOTH: dict[str, tuple[list[Any], list[tuple[Any, str]]]] = {
    "source": ([None, 3, np.str_("small_vgg")], [("", "not a model of timm"), ("no_such", "efficientnet_lite0")]),
    "pretrained": (["yes", None, 1], []),
    "source_weights": ([3, True], [("nowhere.pth", "no such file")]),
    "critical_points": (
        [3, "pool3", [1], ["pool3", None], [np.str_("pool3")], ListConfig(["pool3"])],
        [([], "pool1, pool2"), (["pool9"], "pool1, pool2"), (["pool3", "pool3"], "each level once")],
    ),
    "sigma": (["4", None, True, np.float64(4)], [(-1, "0 or more"), (NAN, "0 or more"), (INF, "0 or more")]),
    "image_size": (
        ["64", 64.0, (64,), (64, 64, 64), (64, None), [], NAN, True, np.int64(64)],
        [(0, "multiples of"), (-32, "multiples of"), (33, "for example"), ((64, 40), "for example")],
    ),
    "imagenet_normalization": (["no", 3], []),
    "region": ([3], [("/no/such.png", "not a readable image")]),
    "epochs": (["3", 2.5, True, NAN, np.int64(3)], [(0, "above 0"), (-1, "above 0")]),
    "learning_rate": (["x", True, np.float64(1e-3)], [(v, "above 0") for v in (0, -1.0, NAN, INF)]),
    "cache": ([True, 16], [("float64", "float32, float16, or null")]),
    "cache_memory": (["x", None], [(v, "0 or more") for v in (-1, NAN, INF)]),
    "cache_folder": ([3], [("/no/such/folder", "Make it first")]),
    "seed": (["x", None, 2.5, True, NAN], [(-1, "0 to 4294967295"), (2**32, "0 to 4294967295")]),
    "pre_processor": ([None, "x", 3], []),
    "post_processor": ([None, "x", 3], []),
    "evaluator": ([None, "x", 3], []),
    "visualizer": ([None, "x", 3], []),
}
PAPER: dict[str, tuple[list[Any], list[tuple[Any, str]]]] = {
    "score_points": (
        [3, "pool3", [1]],
        [
            ([], "critical_points"),
            (["pool1"], "pool2, pool3, pool4, pool5"),
            (["pool3", "pool3"], "each critical point once"),
        ],
    ),
    "cloner": ([None, 1], [("big", "compact, equal")]),
    "cloner_bias": (["no", 2, None], []),
    "cloner_batch_norm": (["no", None], []),
    "terms": ([None, 3], [("cosine", "'total', 'value', 'direction'")]),
    "value_weight": ([None, [1], True], [(v, "above 0, or 'auto'") for v in (0, -1.0, NAN, INF, "Auto")]),
    "scale_channels": (["no", 1, None], []),
    "anomaly_map": ([1, True], [("x", "gradient, smooth_grad, guided_backprop, discrepancy")]),
    "attribution_path": ([None], [("x", "both, cloner")]),
    "smooth_grad_samples": (["3", None, 2.5, NAN, True], [(0, "1 or more"), (-1, "1 or more")]),
    "smooth_grad_noise": (["x", None], [(v, "0 or more") for v in (-1, NAN, INF)]),
    "smooth_grad_as_published": (["no", None], []),
    "explicit_backward": (["no"], []),
    "chunk_size": (["x", None, 1.5], [(0, "1 or more"), (-1, "1 or more")]),
    "percentile_scale": (["no", 1], []),
    # No argument any more, but the error says which model is meant.
    "variant": (
        [1, ["paper"]],
        [("Paper", "use the model KdMultiresolution or KdMultiresolutionDual"), ("dual", "KdMultiresolutionDual")],
    ),
}
DUAL: dict[str, tuple[list[Any], list[tuple[Any, str]]]] = {
    "critical_points": ([], [(["pool3"], "expected two")]),
    "learning_rate": ([], [(1.0, "less than 1")]),
    "variant": ([1], [("Dual", "use the model KdMultiresolution or"), ("paper", "use the model KdMultiresolution.")]),
    "image_score": ([None, 1], [("x", "auto, defects, whole")]),
    "false_alarm_rate": (["x", None], [(v, "above 0 and below 0.5") for v in (0, 0.5, 1, -1, NAN, INF)]),
}
Row = tuple[str, Any, type[Exception], str]


def rows(tables: Sequence[dict[str, tuple[list[Any], list[tuple[Any, str]]]]]) -> list[Row]:
    made: list[Row] = []
    for table in tables:
        for name, (of_another_type, out_of_range) in table.items():
            for value in of_another_type:
                message = WRONG_TYPE.format(value=re.escape(repr(value)), type=type(value).__name__)
                made.append((name, value, TypeError, message))
            made += [(name, value, ValueError, f".*{re.escape(said)}") for value, said in out_of_range]
    return made


@pytest.mark.parametrize(
    ("model_class", "name", "value", "kind", "message"),
    [
        *((KdMultiresolution, *row) for row in rows((BOTH, PAPER))),
        *((KdMultiresolutionDual, *row) for row in rows((BOTH, DUAL))),
    ],
)
def test_the_model_refuses(
    model_class: type[AnomalibModule], name: str, value: Any, kind: type[Exception], message: str
) -> None:
    arguments = {"source": "small_vgg", "pretrained": False, "image_size": 64, name: value}
    if name == "pre_processor":
        del arguments["image_size"]
    with pytest.raises(kind, match=name + message):
        model_class(**arguments)


@pytest.mark.parametrize("model_class", [KdMultiresolution, KdMultiresolutionDual])
def test_every_argument_is_refused_somehow(model_class: type[AnomalibModule]) -> None:
    tables = {KdMultiresolution: (BOTH, PAPER), KdMultiresolutionDual: (BOTH, DUAL)}[model_class]
    assert {name for table in tables for name in table} == {*inspect.signature(model_class).parameters}


@pytest.mark.parametrize(
    ("model_class", "arguments", "message"),
    [
        (
            KdMultiresolution,
            {"sigma": 17.0, "image_size": 64},
            r"sigma=17.0: the blur needs images of at least 68 pixels, not \(64, 64\)",
        ),
        (
            KdMultiresolution,
            {"sigma": 20, "image_size": (128, 64)},
            "sigma=20: .* at least 80 pixels, .*smaller sigma",
        ),
        (KdMultiresolutionDual, {"sigma": 17.0, "image_size": 64}, "sigma=17.0: .* at least 68 pixels"),
        (
            KdMultiresolutionDual,
            {"image_size": (16, 64)},
            r"image_size=\(16, 64\): KdMultiresolutionDual .* at least 32 pixels",
        ),
        (KdMultiresolutionDual, {"image_size": 0}, r"image_size=\(0, 0\): .* for example \(32, 32\)"),
        (
            KdMultiresolution,
            {"critical_points": ["pool3"], "score_points": ["pool4"]},
            r"score_points=.*critical_points, pool3",
        ),
        (KdMultiresolution, {"image_size": 64, "pre_processor": False}, "image_size=64.*Leave them out"),
        (KdMultiresolutionDual, {"image_size": 64, "pre_processor": False}, "image_size=64.*Leave them out"),
    ],
)
def test_the_model_refuses_combinations(
    model_class: type[AnomalibModule], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model_class(**{"source": "small_vgg", "pretrained": False, **arguments})


@pytest.mark.parametrize(
    ("model_class", "name", "value"),
    [
        (KdMultiresolutionDual, "terms", "value"),
        (KdMultiresolution, "image_score", "whole"),
        (KdMultiresolution, "false_alarm_rate", 0.1),
    ],
)
def test_neither_model_has_arguments_of_the_other(model_class: type[AnomalibModule], name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
        model_class("small_vgg", pretrained=False, **{name: value})


@pytest.mark.parametrize("form", ["Python", "command line"])
@pytest.mark.parametrize(("model_class", "variant"), [(KdMultiresolution, "paper"), (KdMultiresolutionDual, "dual")])
def test_a_models_own_variant_is_taken_with_one_sentence(
    model_class: type[AnomalibModule], variant: str, form: str, caplog: pytest.LogCaptureFixture
) -> None:
    if form == "Python":
        model = model_class("small_vgg", pretrained=False, variant=variant)
    else:
        options = ["--model.source=small_vgg", "--model.pretrained=false", f"--model.variant={variant}"]
        model = AnomalibCLI(args=["fit", f"--model={model_class.__name__}", *options], run=False).model
    said = [record.getMessage() for record in caplog.records if record.name.startswith("kd_multiresolution")]
    assert said == [f"variant='{variant}' is no argument any more: use the model {model_class.__name__}."]
    assert model.hparams == model_class("small_vgg", pretrained=False).hparams


def test_scores_alone_need_no_room_for_a_blur() -> None:
    assert KdMultiresolution("small_vgg", pretrained=False, image_size=32, sigma=50.0, anomaly_map=None)


@pytest.mark.parametrize("model", [KdMultiresolutionModel, KdMultiresolutionDualModel])
def test_the_torch_models_check_types_themselves(model: type) -> None:
    with pytest.raises(TypeError, match="sigma='4': expected float, not str"):
        model("small_vgg", sigma="4")


@pytest.mark.parametrize("value", [["pool3", "pool4"], ("pool3", "pool4"), None])
def test_what_fits_is_taken(value: Any) -> None:
    check_types(KdMultiresolution.__init__, {"critical_points": value, "image_size": [64, 64], "sigma": 4})
    check_types(KdMultiresolution.__init__, {"source_weights": Path("a.pth"), "value_weight": "auto", "seed": 0})


COMMON: list[Row] = [
    (name, value, kind, message)
    for name, values, kind, message in (
        ("train_batch_size", (0, -1), ValueError, ": expected 1 or more"),
        ("eval_batch_size", (0, -1), ValueError, ": expected 1 or more"),
        ("num_workers", (-1,), ValueError, ": expected 0 or more"),
        ("val_split_ratio", (0, 1, -1, 2.0, NAN), ValueError, ": expected a part of the images"),
        ("seed", (-1, 2**32), ValueError, ": expected a seed"),
        ("val_split_mode", ("x",), ValueError, ": expected one of none, same_as_test, "),
        ("test_split_mode", ("x",), ValueError, ": expected one of none, from_dir, synthetic"),
        ("train_batch_size", ("8", 2.5, None, True), TypeError, ": expected int, not"),
        ("num_workers", ("2", 1.5, None), TypeError, ": expected int, not"),
        ("val_split_ratio", ("x", None), TypeError, ": expected float, not"),
        ("seed", ("x", 2.5), TypeError, ": expected int"),
        ("val_split_mode", (None, 3), TypeError, ": expected ValSplitMode | str, not"),
        ("augmentations", ("x", 3), TypeError, ": expected Transform | None, not"),
        ("root", (3,), TypeError, ": expected Path | str"),
    )
    for value in values
]
OWN: list[tuple[type, str, Any, type[Exception], str]] = [
    (OneClassFolder, "normal_class", 2.5, TypeError, ": expected int | str, not float"),
    (OneClassCIFAR10, "normal_class", 10, ValueError, ": .*9 truck"),
    (OneClassCIFAR10, "normal_class", "lorry", ValueError, ": .*9 truck"),
    (OneClassCIFAR10, "pictures_per_class", -1, ValueError, ": expected 0 or more"),
    (OneClassCIFAR10, "pictures_per_class", "x", TypeError, ": expected int, not str"),
    (OneClassCIFAR10, "val_split_mode", "from_dir", ValueError, "'from_dir': .*no validation set of its own"),
    (BrainMRI, "split_seed", -1, ValueError, ": expected a seed"),
    (BrainMRI, "split_seed", "x", TypeError, ": expected int, not str"),
    (BrainMRI, "val_split_mode", "from_dir", ValueError, "'from_dir': .*no validation folder"),
    (HeadCT, "augment", "no", TypeError, ": expected bool, not str"),
    (TextureDefects, "category", "sand", ValueError, ": expected one of brick, grass, gravel"),
    (TextureDefects, "category", 3, TypeError, ": expected str, not int"),
    (TextureDefects, "val_split_ratio", 2.0, ValueError, ": expected a part of the images"),
]
MODULES = (OneClassFolder, OneClassCIFAR10, BrainMRI, HeadCT, RetinalOCT, TextureDefects)


@pytest.mark.parametrize(
    ("module", "name", "value", "kind", "message"),
    [*OWN, *((module, *row) for module in MODULES for row in COMMON)],
)
def test_a_data_module_refuses(module: type, name: str, value: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=rf"^{name}=.*{message.replace('|', '[|]')}"):
        module(**{"root": "nowhere", name: value})


# Through jsonargparse, which takes strings: types are its part, ranges ours.
FROM_OUTSIDE = [
    ("KdMultiresolution", "model.value_weight", "0", "value_weight=0.0: expected a number above 0"),
    ("KdMultiresolution", "model.sigma", "-1", "sigma=-1.0: expected a number of pixels"),
    ("KdMultiresolution", "model.sigma", "wide", "sigma"),
    ("KdMultiresolution", "model.image_size", "33", r"image_size=\(33, 33\): .*for example"),
    ("KdMultiresolution", "model.critical_points", "[pool9]", r"critical_points=\['pool9'\]: .*pool1, pool2"),
    ("KdMultiresolution", "model.score_points", "[pool1]", r"score_points=\['pool1'\]: .*critical_points, pool2"),
    ("KdMultiresolution", "model.variant", "triple", "triple"),
    ("KdMultiresolution", "model.variant", "dual", "variant='dual' .*: use the model KdMultiresolutionDual"),
    ("KdMultiresolution", "model.no_such_argument", "1", "no_such_argument"),
    ("KdMultiresolution", "model.false_alarm_rate", "0.1", "false_alarm_rate"),
    ("KdMultiresolutionDual", "model.false_alarm_rate", "0.7", "false_alarm_rate=0.7: .* below 0.5"),
    ("KdMultiresolutionDual", "model.image_score", "best", "image_score"),
    ("KdMultiresolutionDual", "model.critical_points", "[pool3]", r"critical_points=\['pool3'\]: .*expected two"),
    ("KdMultiresolutionDual", "model.score_points", "[pool4]", "score_points"),
    ("KdMultiresolutionDual", "model.variant", "triple", "use the model KdMultiresolution or KdMultiresolutionDual"),
    ("KdMultiresolutionDual", "model.variant", "paper", r"variant='paper' .*: use the model KdMultiresolution\."),
    ("KdMultiresolution", "data.train_batch_size", "0", "train_batch_size=0: expected 1 or more"),
    ("KdMultiresolution", "data.train_batch_size", "many", "train_batch_size"),
    ("KdMultiresolution", "data.val_split_ratio", "2", "val_split_ratio=2.0: expected a part"),
    ("KdMultiresolution", "data.category", "sand", "category='sand': expected one of brick"),
]


@pytest.mark.parametrize("form", ["command line", "yaml"])
@pytest.mark.parametrize(("model", "key", "value", "message"), FROM_OUTSIDE)
def test_anomalibs_command_refuses(
    form: str, model: str, key: str, value: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    group, name = key.split(".")
    config: dict[str, dict[str, Any]] = {
        "model": {"class_path": model, "init_args": {"source": "small_vgg", "pretrained": False}},
        "data": {"class_path": "TextureDefects", "init_args": {"root": str(tmp_path)}},
    }
    arguments = []
    if form == "yaml":
        config[group]["init_args"][name] = yaml.safe_load(value)
    else:
        arguments = [f"--{key}={value}"]
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    with pytest.raises((SystemExit, ValueError)) as caught:
        AnomalibCLI(args=["train", "--config", str(file), *arguments], run=False)
    assert re.search(message, f"{capsys.readouterr().err} {caught.value}", re.DOTALL)
