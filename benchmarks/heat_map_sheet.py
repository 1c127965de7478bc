"""Put one heat map of each defect kind of a test run into one picture, as in the README.

anomalib train --config configs/demo.yaml
python benchmarks/heat_map_sheet.py results/KdMultiresolutionDual/TextureDefects/brick/latest/images docs/heat_maps.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

WIDTH = 900  # pixels


def sheet(images: Path, name: str) -> Image.Image:
    """Return the pictures called ``name`` of all folders below ``images``, one row each, without the normal ones."""
    rows = [Image.open(path) for path in sorted(images.rglob(name)) if path.parent.name != "good"]
    if not rows:
        msg = f"images={str(images)!r}: no {name} in any folder below it."
        raise SystemExit(msg)
    picture = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)))
    top = 0
    for row in rows:
        picture.paste(row, (0, top))
        top += row.height
    picture.thumbnail((WIDTH, picture.height))
    return picture


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path, help="folder of heat maps, as the log names it")
    parser.add_argument("output", type=Path, help="picture to write")
    parser.add_argument("--name", default="004.png", help="file to take from each folder")
    arguments = parser.parse_args()
    sheet(arguments.images, arguments.name).save(arguments.output, optimize=True)
