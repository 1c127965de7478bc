"""Two processes on the CPU against one with the doubled batch: of either model, and what is equal."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.utils import save_image

# Lightning starts the second process by running this file again.
SCRIPT = """
import sys
from pathlib import Path
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from lightning.pytorch import Callback
import kd_multiresolution

root, output, name, devices, batch = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
torch.set_num_threads(1)
# Batch norm would see half of the batch: --trainer.sync_batchnorm joins it on GPUs, but not on the CPU.
paper = {"value_weight": "auto", "cloner_batch_norm": False, "scale_channels": True}
own = paper if name == "KdMultiresolution" else {}
model = getattr(kd_multiresolution, name)("efficientnet_lite0", image_size=32, epochs=4, visualizer=False, **own)
data = Folder("noise", root=root, normal_dir="good", abnormal_dir="defect", normal_test_dir="test",
              train_batch_size=batch, eval_batch_size=1, num_workers=0, val_split_mode="same_as_test")
on_the_way = []


class Look(Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        for path in Path(output).rglob("*.ckpt") if trainer.is_global_zero else ():
            state = torch.load(path, weights_only=True)["state_dict"]
            on_the_way.append([float(state[f"post_processor._{kind}_threshold"]) for kind in ("image", "pixel")])


engine = Engine(default_root_dir=output, logger=False, enable_progress_bar=False, accelerator="cpu", devices=devices,
                strategy="ddp" if devices > 1 else "auto", callbacks=[Look()])
engine.fit(model, datamodule=data)
loss = float(engine.trainer.callback_metrics["train_loss"])
metrics = engine.test(model, datamodule=data)
weights = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
result = {"weights": weights, "value_weight": getattr(model.model, "value_weight", None), "metrics": metrics[0],
          "on_the_way": on_the_way, "loss": loss}
torch.save(result, f"{output}/{engine.trainer.global_rank}.pt")
"""


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo"),
]
Result = dict[str, Any]


def train(folder: Path, model: str) -> tuple[Result, tuple[Result, Result]]:
    """Return weights and metrics of one process, and of each of two with half the batch."""
    for name, count in (("good", 8), ("test", 2), ("defect", 2)):
        (folder / name).mkdir()
        for i in range(count):
            generator = torch.Generator().manual_seed(100 * len(name) + i)
            save_image(torch.rand(3, 32, 32, generator=generator), folder / name / f"{i}.png")
    script = folder / "train.py"
    script.write_text(SCRIPT)
    # One step per epoch: however the images are shuffled, both processes together see all of them.
    for devices, batch in ((1, 8), (2, 4)):
        output = folder / str(devices)
        output.mkdir()
        process = subprocess.run(
            [sys.executable, "-W", "ignore", script, folder, output, model, str(devices), str(batch)],
            capture_output=True, text=True, check=False, env={**os.environ, "MASTER_ADDR": "127.0.0.1"},
        )  # fmt: skip
        assert process.returncode == 0, process.stderr[-3000:]
    one, first, second = (torch.load(folder / name, weights_only=True) for name in ("1/0.pt", "2/0.pt", "2/1.pt"))
    return one, (first, second)


def test_two_processes_give_what_one_gives_with_the_doubled_batch(tmp_path: Path) -> None:
    one, two = train(tmp_path, "KdMultiresolution")
    for process in two:
        torch.testing.assert_close(process["weights"], one["weights"], rtol=1e-3, atol=1e-5)
        assert process["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert process["value_weight"] == pytest.approx(one["value_weight"], rel=1e-5)
    assert two[0]["metrics"] == pytest.approx(one["metrics"], abs=1e-6)
    found = torch.tensor(two[0]["on_the_way"])
    assert found.shape == (3, 2), "each checkpoint over the one before"
    assert found.isfinite().all(), "of two processes none could complete the last one afterwards"


def test_two_processes_of_the_dual_model_share_their_statistics_and_weights(tmp_path: Path) -> None:
    one, (first, second) = train(tmp_path, "KdMultiresolutionDual")
    assert first["weights"].keys() == one["weights"].keys()
    # Between the processes all is equal: weights, statistics, thresholds, the mean loss.
    torch.testing.assert_close(second["weights"], first["weights"], rtol=0, atol=0)
    assert second["loss"] == first["loss"]
    # Which images meet in a batch decides which of them the local cloner sees, but not what a channel's units are.
    units = [name for name in one["weights"] if ".units." in name]
    assert units
    for name in units:
        torch.testing.assert_close(first["weights"][name], one["weights"][name], rtol=1e-5, atol=1e-6)
