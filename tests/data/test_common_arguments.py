"""The arguments that a constructor hands on are typed, documented and refused as if they stood in it."""

from __future__ import annotations

import re

import pytest
from anomalib.data import AnomalibDataModule
from jsonargparse import ArgumentParser

import kd_multiresolution.data as ours

MODULES = sorted(set(ours.__all__) - {"BMADWithoutMasks"})
IN_MEMORY = {"num_workers": "0"}
OTHER_DEFAULTS = {
    "OneClassCIFAR10": IN_MEMORY,
    "OneClassFashionMNIST": IN_MEMORY,
    "OneClassMNIST": IN_MEMORY,
    "TextureDefects": {"train_batch_size": "64", "num_workers": "0", "val_split_ratio": "0.5", "seed": "0"},
}
# By argument: the type and the default on the command line.
COMMON = {
    "train_batch_size": ("int", "32"),
    "eval_batch_size": ("int", "32"),
    "num_workers": ("int", "8"),
    "train_augmentations": ("Transform | None", "null"),
    "val_augmentations": ("Transform | None", "null"),
    "test_augmentations": ("Transform | None", "null"),
    "augmentations": ("Transform | None", "null"),
    "test_split_mode": ("TestSplitMode | str", "FROM_DIR"),
    "val_split_mode": ("ValSplitMode | str", "SAME_AS_TEST"),
    "val_split_ratio": ("float", "0.1"),
    "seed": ("int | None", "null"),
}


def parser() -> ArgumentParser:
    made = ArgumentParser()
    made.add_subclass_arguments(AnomalibDataModule, "data")
    return made


@pytest.mark.parametrize("name", MODULES)
def test_the_command_line_shows_each_with_type_default_and_sentence(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args([f"--data.help={name}"])
    shown = " ".join(capsys.readouterr().out.split())
    for argument, (kind, default) in COMMON.items():
        expected = re.escape(OTHER_DEFAULTS.get(name, {}).get(argument, default))
        kind = "int" if (name, argument) == ("TextureDefects", "seed") else re.escape(kind)
        sentence = r"[\w`](?:(?! --data\.).)+\."
        line = rf" --data\.{argument} {argument.upper()} {sentence} \(type: {kind}, default: {expected}[,)]"
        assert re.search(line, shown), argument


@pytest.mark.parametrize("name", MODULES)
def test_an_unknown_one_is_refused_by_the_class_that_was_called(name: str) -> None:
    with pytest.raises(TypeError, match=rf"^{name}\.__init__\(\) got an unexpected keyword argument 'no_such'$"):
        getattr(ours, name)(root="nowhere", no_such=1)


@pytest.mark.parametrize("name", MODULES)
def test_the_command_line_refuses_an_unknown_one(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["--data", name, "--data.root=nowhere", "--data.no_such=1"])
    assert "Option 'no_such' is not accepted" in capsys.readouterr().err


def test_the_normal_class_of_oct_cannot_be_chosen() -> None:
    with pytest.raises(TypeError, match="'normal_class'"):
        ours.RetinalOCT(normal_class="CNV")
