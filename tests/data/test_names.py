from __future__ import annotations

import subprocess
import sys

import anomalib.data
import pytest
from anomalib.data import AnomalibDataModule, get_datamodule
from jsonargparse import ArgumentParser

import kd_multiresolution.data as ours

MODULES = sorted(set(ours.__all__) - {"TextureDefects", "OneClassFolder"})


@pytest.mark.parametrize("name", ours.__all__)
def test_is_an_attribute_of_anomalib_data(name: str) -> None:
    assert getattr(anomalib.data, name) is getattr(ours, name)


@pytest.mark.parametrize("name", MODULES)
def test_get_datamodule_finds_it(name: str) -> None:
    config = {"class_path": name, "init_args": {"root": "somewhere", "eval_batch_size": 7}}
    datamodule = get_datamodule(config)
    assert type(datamodule) is getattr(ours, name)
    assert datamodule.eval_batch_size == 7


@pytest.mark.parametrize("name", ours.__all__)
def test_the_command_line_finds_it(name: str) -> None:
    # As anomalib's command line builds its parser for --data.
    parser = ArgumentParser()
    parser.add_subclass_arguments(AnomalibDataModule, "data")
    arguments = ["--data", name, "--data.val_split_mode", "from_train", "--data.val_split_ratio", "0.25"]
    root = [] if name == "TextureDefects" else ["--data.root", "somewhere"]
    datamodule = parser.instantiate_classes(parser.parse_args([*arguments, *root])).data
    assert type(datamodule) is getattr(ours, name)
    assert datamodule.val_split_ratio == 0.25


@pytest.mark.parametrize(("given", "number"), [("3", 3), ("three", 3), ("Three", 3)])
def test_the_command_line_takes_a_class_by_number_or_name(given: str, number: int) -> None:
    parser = ArgumentParser()
    parser.add_subclass_arguments(AnomalibDataModule, "data")
    config = parser.parse_args(["--data", "OneClassMNIST", "--data.normal_class", given])
    assert parser.instantiate_classes(config).data.normal_class == number


@pytest.mark.slow
@pytest.mark.parametrize("first", ["kd_multiresolution.data", "anomalib.visualization"])
def test_every_order_of_import_works(first: str) -> None:
    code = (
        f"import {first}, kd_multiresolution.data, anomalib.data\n"
        "assert anomalib.data.OneClassMNIST is kd_multiresolution.data.OneClassMNIST"
    )
    result = subprocess.run([sys.executable, "-W", "error::RuntimeWarning", "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
