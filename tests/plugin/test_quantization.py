"""Post-training quantisation reads its images as a training does."""

from __future__ import annotations

from pathlib import Path

import pytest
from anomalib.data import Folder
from anomalib.deploy import CompressionType
from anomalib.models import AnomalibModule

from kd_multiresolution import KdMultiresolution
from kd_multiresolution.plugin.quantization import quantize_source
from tests.data.generated import write_noise_folders
from tests.plugin.pictures import DEEP

pytestmark = pytest.mark.slow


def test_without_data_it_says_what_anomalib_says() -> None:
    with pytest.raises(ValueError, match="Datamodule must be provided") as theirs:
        AnomalibModule._post_training_quantization_ov(None)
    with pytest.raises(ValueError, match=f"^{theirs.value}: its training images calibrate it"):
        quantize_source(None, None, KdMultiresolution("small_vgg"))


def test_a_deep_image_calibrates_nothing_nor_does_a_hidden_file(tmp_path: Path) -> None:
    write_noise_folders(tmp_path, 4, (64, 64))
    (tmp_path / "good" / "._0.png").write_bytes(b"no image")
    deep = tmp_path / "good" / "3.png"
    DEEP["rgb.png"](deep)
    data = Folder("noise", root=tmp_path, normal_dir="good", abnormal_dir="bad", normal_test_dir="bad", num_workers=0)
    network = KdMultiresolution(source="small_vgg", image_size=64, anomaly_map="discrepancy")
    with pytest.raises(ValueError, match=f"^{deep}: 16 bits per channel"):
        network.to_openvino(tmp_path, compression_type=CompressionType.INT8_PTQ, datamodule=data)
