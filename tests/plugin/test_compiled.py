"""A test with a compiled model gives the figures of one without, and takes the compiled one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.data import Folder
from anomalib.engine import Engine

from kd_multiresolution import CompiledEvaluation, KdMultiresolution, KdMultiresolutionDual
from kd_multiresolution.plugin.finite import NonFiniteError
from tests.data.generated import write_noise_folders


@pytest.mark.slow
@pytest.mark.parametrize("kind", [KdMultiresolution, KdMultiresolutionDual])
def test_a_compiled_model_is_tested_alike(kind: type[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_noise_folders(tmp_path, 6)
    network = kind("small_vgg", image_size=32, sigma=1.0, visualizer=False)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    found = []
    for callbacks in ([], [CompiledEvaluation(backend=backend)]):  # type: ignore[arg-type]
        data = Folder("noise", root=tmp_path, normal_dir="good", abnormal_dir="bad", num_workers=0, seed=0)
        settings: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu"}
        engine = Engine(default_root_dir=tmp_path / "out", callbacks=callbacks, **settings)
        found.append(engine.test(network, datamodule=data)[0])
    assert graphs
    assert found[0] == pytest.approx(found[1], abs=1e-6)
    count = len(graphs)
    network.eval()(torch.rand(1, 3, 32, 32))
    assert len(graphs) == count, "the model is left as it was"
    network.model.compile(backend="eager")
    own = network.model._compiled_call_impl
    engine.predict(network, datamodule=data)
    assert network.model._compiled_call_impl is own, "one that the user has compiled as well"
    network.model._compiled_call_impl = None
    with pytest.raises(NonFiniteError):
        network(torch.full((1, 3, 32, 32), torch.nan))

    def stop(*_: Any) -> None:
        msg = "no more"
        raise RuntimeError(msg)

    monkeypatch.setattr(network, "on_test_batch_end", stop)
    with pytest.raises(RuntimeError, match="no more"):
        engine.test(network, datamodule=data)
    count = len(graphs)
    network.eval()(torch.rand(1, 3, 32, 32))
    assert len(graphs) == count, "nor is it another one after a test that broke off"


@pytest.mark.slow
@pytest.mark.parametrize("kind", [KdMultiresolution, KdMultiresolutionDual])
def test_results_stay_where_a_graph_writes_all_to_the_same_place(kind: type[Any], tmp_path: Path) -> None:
    """As a CUDA graph does."""
    write_noise_folders(tmp_path, 6)
    network = kind("small_vgg", image_size=32, sigma=1.0, visualizer=False, post_processor=False)

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        kept: list[torch.Tensor] = []

        def replayed(*arguments: torch.Tensor) -> tuple[torch.Tensor, ...]:
            results = graph.forward(*arguments)
            if not kept or kept[0].shape != results[0].shape:
                kept[:] = [result.clone() for result in results]
            for place, result in zip(kept, results, strict=True):
                place.copy_(result)
            return tuple(kept)

        return replayed

    torch.compiler.reset()
    found = []
    for callbacks in ([], [CompiledEvaluation(backend=backend)]):  # type: ignore[arg-type]
        data = Folder(
            "noise", root=tmp_path, normal_dir="good", abnormal_dir="bad", eval_batch_size=1, num_workers=0, seed=0,
        )  # fmt: skip
        settings: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu"}
        engine = Engine(default_root_dir=tmp_path / "out", callbacks=callbacks, **settings)
        data.setup()
        found.append(engine.predict(network, dataloaders=data.test_dataloader()))
    assert len(found[0]) > 1
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled.pred_score, plain.pred_score)
        torch.testing.assert_close(compiled.anomaly_map, plain.anomaly_map)
