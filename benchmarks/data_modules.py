"""Measure how long each data module takes to start at full size, and how much memory it takes.

python benchmarks/data_modules.py --data OneClassMNIST=datasets BrainMRI=datasets/BrainMRI --output data_modules.md

A data module without a folder gets a stand-in of the published number of images: noise of the published size for those
served from memory, hard links to one small picture for the folders, of which only names are read; for OneClassCIFAR10
there is none. Each is measured in a
process of its own, from the constructor to the end of ``setup``; imports do not count.
"""

from __future__ import annotations

import argparse
import gzip
import logging
import multiprocessing
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import anomalib.data
import numpy as np
import psutil
from anomalib.data import AnomalibDataModule
from PIL import Image
from rich.progress import track

import kd_multiresolution.data  # noqa: F401 - registers our data modules with anomalib

# Images per folder, as published.
FOLDERS: Mapping[str, Mapping[str, int]] = {
    "OneClassFolder": {f"{split}/{name}": n for split, n in (("train", 5000), ("test", 1000)) for name in "abcdefghij"},
    "RetinalOCT": {
        **{"train/CNV": 37_205, "train/DME": 11_348, "train/DRUSEN": 8_616, "train/NORMAL": 26_315},
        **{f"test/{name}": 250 for name in ("CNV", "DME", "DRUSEN", "NORMAL")},
    },
    "BrainMRI": {"no": 98, "yes": 155},
    "HeadCT": {"head_ct": 200},
}
IDX_FILES = {"OneClassMNIST": "MNIST", "OneClassFashionMNIST": "FashionMNIST"}
MODULES = (*IDX_FILES, "OneClassCIFAR10", *FOLDERS)
NO_STAND_IN = "OneClassCIFAR10"  # torchvision checks its files by their MD5 sums


@dataclass(frozen=True)
class Start:
    """What the start of a data module took.

    Attributes:
        seconds: from the constructor to the end of ``setup``.
        cpu_seconds: of these, spent computing; other programs of a busy machine do not count.
        mebibytes: resident memory that the process has more of afterwards.
        train: training images.
        test: test images.
    """

    seconds: float
    cpu_seconds: float
    mebibytes: float
    train: int
    test: int


def start(name: str, root: Path) -> Start:
    """Start a data module; to be called in a process of its own, which has not kept memory from anything else."""
    process = psutil.Process()
    before = process.memory_info().rss
    began, cpu_began = time.perf_counter(), time.process_time()
    module: AnomalibDataModule = getattr(anomalib.data, name)(root=root, num_workers=0)
    module.prepare_data()
    module.setup()
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    mebibytes = (process.memory_info().rss - before) / 2**20
    return Start(seconds, cpu_seconds, mebibytes, len(module.train_data), len(module.test_data))


def write_stand_in(name: str, root: Path) -> None:
    """Write files as many and as large as the published ones, where a data module expects them."""
    generator = np.random.default_rng(0)
    if name in IDX_FILES:
        folder = root / IDX_FILES[name] / "raw"
        folder.mkdir(parents=True)
        for prefix, count in (("train", 60_000), ("t10k", 10_000)):
            images = generator.integers(0, 256, (count, 28, 28), np.uint8)
            for kind, array in (("images-idx3", images), ("labels-idx1", (np.arange(count) % 10).astype(np.uint8))):
                header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
                (folder / f"{prefix}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes(), 1))
    else:
        write_folders(root, FOLDERS[name])
        if name == "HeadCT":
            rows = "".join(f"{number},{number // 100}\n" for number in range(200))
            (root / "labels.csv").write_text("id,hemorrhage\n" + rows)


def write_folders(root: Path, counts: Mapping[str, int]) -> None:
    """Fill folders with links to one small picture."""
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True)
        picture = root / folder / "000.png"
        Image.new("L", (8, 8)).save(picture)
        for number in range(1, count):
            picture.with_name(f"{number:03d}.png").hardlink_to(picture)


def measured(name: str, root: Path | None, repetitions: int) -> list[Start]:
    """Return the starts of a data module, each in a fresh process."""
    with TemporaryDirectory() as temporary:
        if root is None:
            root = Path(temporary)
            write_stand_in(name, root)
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, spawn, initializer=_quiet, max_tasks_per_child=1) as pool:
            return list(pool.map(start, [name] * repetitions, [root] * repetitions))


def _quiet() -> None:
    # Of a stand-in that its pictures are copies of one.
    logging.getLogger("kd_multiresolution").setLevel(logging.ERROR)


def render(starts: Mapping[str, Sequence[Start]], roots: Mapping[str, Path]) -> str:
    """Return the table: the slowest and the largest of the repetitions."""
    lines = [
        "| data module | images | training | test | seconds | CPU seconds | MiB |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, repeated in starts.items():
        first = repeated[0]
        seconds, cpu_seconds = max(s.seconds for s in repeated), max(s.cpu_seconds for s in repeated)
        memory = max(s.mebibytes for s in repeated)
        kind = "published" if name in roots else "stand-in"
        figures = f"{seconds:.2f} | {cpu_seconds:.2f} | {memory:.0f}"
        lines.append(f"| {name} | {kind} | {first.train:,} | {first.test:,} | {figures} |")
    return "\n".join(lines) + "\n"


def named_folder(text: str) -> tuple[str, Path]:
    """Return name and folder of ``NAME=FOLDER``."""
    name, equals, folder = text.partition("=")
    if name not in MODULES or not equals:
        msg = f"{text}: expected NAME=FOLDER, with a name of {', '.join(MODULES)}."
        raise argparse.ArgumentTypeError(msg)
    return name, Path(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all of them, write the table and print it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add: Any = parser.add_argument
    add("--data", nargs="+", type=named_folder, default=[], metavar="NAME=FOLDER", help="published images, if at hand")
    add("--modules", nargs="+", choices=MODULES, help="instead of all that can be measured")
    add("--repetitions", type=int, default=3, help="fresh processes per data module")
    add("--output", type=Path, default=Path("results/data_modules.md"), help="the table's file")
    options = parser.parse_args(arguments)
    roots = dict(options.data)
    names = options.modules or [name for name in MODULES if name in roots or name != NO_STAND_IN]
    if NO_STAND_IN in names and NO_STAND_IN not in roots:
        parser.error(f"{NO_STAND_IN}: torchvision checks the published files; name their folder with --data.")
    starts = {
        name: measured(name, roots.get(name), options.repetitions)
        for name in track(names, "data modules", transient=True)
    }
    text = render(starts, roots)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
