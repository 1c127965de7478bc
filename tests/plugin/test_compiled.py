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
