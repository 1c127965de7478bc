"""OpenVINO files that ask for float32 themselves.

On processors that have it, OpenVINO computes in bfloat16 unless whoever loads a model says otherwise, and anomalib's
inferencer scripts say nothing. A hint for the whole model (``runtime_options``) is not heeded. Of a single operation a
file can say that its precision must not be lowered; OpenVINO says it of parts of its own models so. It is no more than
half of a cure: operations that OpenVINO rewrites, such as subtractions, lose it (see ``docs/deployment.md``).
"""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree as Xml

ATTRIBUTE = {"name": "DisablePrecisionConversion", "version": "0", "value": "dynamic:bf16,f16"}  # since OpenVINO 2026
WITHOUT_PRECISION = ("Const", "Parameter", "Result")


def ask_for_float32(file: Path) -> None:
    """Let every operation of an OpenVINO file ask for the precision that it was written with.

    Args:
        file: ``.xml``.
    """
    tree = Xml.parse(file)
    for layer in tree.iter("layer"):
        if layer.get("type") in WITHOUT_PRECISION:
            continue
        about = layer.find("rt_info")
        if about is None:
            about = Xml.SubElement(layer, "rt_info")
        Xml.SubElement(about, "attribute", ATTRIBUTE)
    tree.write(file)
