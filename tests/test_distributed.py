"""Two processes on the CPU against one with the doubled batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torchvision.utils import save_image

# Lightning starts the second process by running this file again.
SCRIPT = """
import sys
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from kd_multiresolution import KdMultiresolution

root, output, devices, batch = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(1)
# Batch norm would see half of the batch: --trainer.sync_batchnorm joins it on GPUs, but not on the CPU.
model = KdMultiresolution(
    source="light_vgg", image_size=32, epochs=4, value_weight="auto", cloner_batch_norm=False, visualizer=False
)
data = Folder("noise", root=root, normal_dir="good", abnormal_dir="defect", normal_test_dir="test",
              train_batch_size=batch, eval_batch_size=1, num_workers=0, val_split_mode="same_as_test")
engine = Engine(default_root_dir=output, logger=False, enable_progress_bar=False, accelerator="cpu", devices=devices,
                strategy="ddp" if devices > 1 else "auto")
engine.fit(model, datamodule=data)
metrics = engine.test(model, datamodule=data)
if engine.trainer.is_global_zero:
    torch.save({
        "cloner": model.model.cloner.state_dict(), "value_weight": model.model.value_weight, "metrics": metrics[0],
        "loss": float(engine.trainer.callback_metrics.get("train_loss", 0)),
    }, output + "/result.pt")
"""


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_two_processes_give_what_one_gives_with_the_doubled_batch(tmp_path: Path) -> None:
    for folder, count in (("good", 8), ("test", 2), ("defect", 2)):
        (tmp_path / folder).mkdir()
        for i in range(count):
            generator = torch.Generator().manual_seed(100 * len(folder) + i)
            save_image(torch.rand(3, 32, 32, generator=generator), tmp_path / folder / f"{i}.png")
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    results = []
    # One step per epoch: however the images are shuffled, both processes together see all of them.
    for devices, batch in ((1, 8), (2, 4)):
        output = tmp_path / str(devices)
        output.mkdir()
        process = subprocess.run(
            [sys.executable, "-W", "ignore", str(script), str(tmp_path), str(output), str(devices), str(batch)],
            capture_output=True, text=True, check=False, env={**os.environ, "MASTER_ADDR": "127.0.0.1"},
        )  # fmt: skip
        assert process.returncode == 0, process.stderr[-3000:]
        results.append(torch.load(output / "result.pt", weights_only=True))
    one, two = results
    assert two["value_weight"] == pytest.approx(one["value_weight"], rel=1e-5)
    for name, tensor in one["cloner"].items():
        torch.testing.assert_close(two["cloner"][name], tensor, rtol=1e-3, atol=1e-5)
    assert two["metrics"] == pytest.approx(one["metrics"], abs=1e-6)
