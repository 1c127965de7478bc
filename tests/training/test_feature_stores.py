"""The file that features go into."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kd_multiresolution.training.feature_stores import FileStore


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not say what a process holds")
def test_features_in_the_file_take_no_memory(tmp_path: Path) -> None:
    def resident_mib() -> float:
        lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines["VmRSS"].split()[0]) / 1024

    store = FileStore(tmp_path, 128, [(512, 512, 1)], torch.float32)  # 128 MiB
    rows = [torch.full((512, 512, 1), float(row)) for row in range(128)]
    before = resident_mib()
    for row, feature in enumerate(rows):
        store.write(row, [feature])
    for row, feature in enumerate(rows):
        assert torch.equal(store.read([row])[0][0], feature)
    assert resident_mib() - before < 32
