"""The configurations in ``configs/``: each makes a model and a data module."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import yaml
from anomalib.cli.cli import AnomalibCLI
from anomalib.data.datasets.image.mvtecad import CATEGORIES
from anomalib.pipelines.benchmark.generator import BenchmarkJobGenerator

from kd_multiresolution import KdMultiresolution, KdMultiresolutionDual
from kd_multiresolution.paper.presets import PRESETS

CONFIGS = Path(__file__).parents[1] / "configs"
OTHERS = {"demo": "TextureDefects", "dual": "MVTecAD", "folder": "parts"}
BENCHMARK = CONFIGS / "benchmark.yaml"
TRAINING_CONFIGS = sorted(set(CONFIGS.glob("*.yaml")) - {BENCHMARK})


def test_every_config_has_a_preset_or_is_not_the_papers() -> None:
    assert {path.stem for path in TRAINING_CONFIGS} == {*PRESETS, *OTHERS}


@pytest.mark.parametrize("path", TRAINING_CONFIGS, ids=lambda path: path.stem)
def test_every_config_makes_a_model_and_a_data_module(path: Path) -> None:
    # A small source stands in for those whose weights would be downloaded.
    cli = AnomalibCLI(args=["fit", "--config", str(path), "--model.source", "small_vgg"], run=False)
    preset = PRESETS.get(path.stem)
    assert type(cli.model) is (KdMultiresolutionDual if path.stem in {"demo", "dual"} else KdMultiresolution)
    assert cli.datamodule.name == (OTHERS[path.stem] if preset is None else preset.data)
    if preset is not None:
        assert tuple(cli.model.input_size) == preset.image_size
        assert cli.model.model.value_weight == preset.value_weight
        assert cli.datamodule.train_batch_size == 64


@pytest.mark.slow
def test_the_benchmark_makes_every_model(monkeypatch: pytest.MonkeyPatch) -> None:
    create_model = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda *args, **kwargs: create_model(*args, **{**kwargs, "pretrained": False})
    )
    config = yaml.safe_load(BENCHMARK.read_text())["benchmark"]
    categories = config["data"]["init_args"]["category"]
    assert set(categories["grid"]) <= set(CATEGORIES)
    categories["grid"] = categories["grid"][:1]  # the models are large
    jobs = [*BenchmarkJobGenerator("cpu").generate_jobs(config, None)]
    names = [type(job.model).__name__ for job in jobs]
    assert names == ["KdMultiresolution", "KdMultiresolutionDual", "Padim", "Patchcore"]
    assert all(job.model.visualizer is None for job in jobs)
    # anomalib makes one table of all results, whose columns must be the same.
    assert len({tuple(job.flat_cfg) for job in jobs}) == 1
