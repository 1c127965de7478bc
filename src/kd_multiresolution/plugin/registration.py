"""Registration with anomalib: what makes ``anomalib train --model kd_multiresolution`` and its relatives work.

anomalib has no plugin interface. Its registry is "direct subclasses of ``AnomalibModule`` that have been imported"; the
files below ``src/startup`` see to the import, and each module that defines a model calls this function at its end, so
that every order of imports works.
"""

from __future__ import annotations

# "as": while anomalib.models is still being imported it is not yet an attribute of anomalib.
import anomalib.models as registry
from anomalib.models.components import AnomalibModule


def register_models(*models: type[AnomalibModule]) -> None:
    """Make models attributes of ``anomalib.models``, and our package one that ``get_model`` may load from.

    ``ALLOWED_MODULES`` keeps anomalib from importing whatever a configuration names; this adds our package alone.
    """
    for model in models:
        setattr(registry, model.__name__, model)
    registry.ALLOWED_MODULES.add("kd_multiresolution")
