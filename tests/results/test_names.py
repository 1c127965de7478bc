from __future__ import annotations

from pathlib import Path

import pytest
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.utils.path import generate_output_filename
from hypothesis import given
from hypothesis import strategies as st

from kd_multiresolution import KdMultiresolution
from kd_multiresolution.results.names import PictureNames
from tests.data.generated import write_noise_folders


def test_names_are_anomalibs_as_long_as_they_differ() -> None:
    paths = ["/data/parts/good/1.png", "/data/parts/defect/1.png", "/data/parts/defect/deep/1.png"]
    for data, category in ((None, None), ("parts", None), ("data", "parts")):
        names = PictureNames(paths, data, category)
        for path in paths:
            assert Path(names(path)) == generate_output_filename(path, Path(), data, category, mkdir=False)


def test_all_names_are_longer_where_two_would_be_one() -> None:
    names = PictureNames(["/in/line1/cam/1.png", "/in/line2/cam/1.png", "/in/line2/cam/2.png"])
    assert names("/in/line1/cam/1.png") == "line1/cam/1.png"
    assert names("/in/line2/cam/1.png") == "line2/cam/1.png"
    assert names("/in/line2/cam/2.png") == "line2/cam/2.png"


def test_images_that_no_data_set_knew_get_longer_names_as_they_come() -> None:
    names = PictureNames()
    paths = ["/in/line1/cam/1.png", "/in/line2/cam/1.png", "/other/line2/cam/1.png", "/cam/1.png"]
    assert [names(path) for path in paths] == [
        "cam/1.png", "line2/cam/1.png", "other/line2/cam/1.png", "_cam/1.png",
    ]  # fmt: skip
    assert [names(path) for path in paths[:2]] == ["cam/1.png", "line2/cam/1.png"]


PATHS = st.lists(st.sampled_from(["a", "b", "data"]), min_size=1, max_size=4).map(lambda parts: "/" + "/".join(parts))


@given(paths=st.sets(PATHS.map(lambda folder: f"{folder}/1.png"), min_size=1), known=st.booleans(), named=st.booleans())
def test_no_two_images_share_a_name(paths: set[str], known: bool, named: bool) -> None:
    names = PictureNames(paths if known else (), "data" if named else None)
    given_names = [names(path) for path in sorted(paths)]
    assert len({*given_names}) == len(paths)
    assert all(not Path(name).is_absolute() and ".." not in Path(name).parts for name in given_names)


@pytest.mark.parametrize("path", ["1.png", "./good/1.png"])
def test_relative_paths_have_the_names_of_absolute_ones(path: str) -> None:
    assert PictureNames()(path) == PictureNames()(str(Path(path).absolute()))


def test_an_earlier_runs_data_module_names_nothing(tmp_path: Path) -> None:
    modules = []
    for root in (tmp_path / "first", tmp_path / "second" / "noise" / "line"):
        write_noise_folders(root, 4)
        modules.append(Folder("noise", root=root, normal_dir="good", abnormal_dir="bad", num_workers=0))
        modules[-1].setup()
    engine = Engine(default_root_dir=tmp_path, logger=False, accelerator="cpu")
    model = KdMultiresolution("small_vgg", image_size=32, anomaly_map="discrepancy")
    engine.test(model, datamodule=modules[0])
    engine.test(model, dataloaders=modules[1].test_dataloader())
    names = model.visualizer.run.names
    assert names(str(tmp_path / "second" / "noise" / "line" / "bad" / "0.png")) == "bad/0.png", "not line/bad/0.png"
