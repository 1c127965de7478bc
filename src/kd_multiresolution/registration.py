"""Registration with anomalib: what makes ``anomalib train --model kd_multiresolution`` and its relatives work.

anomalib has no plugin interface. Its registry is "direct subclasses of ``AnomalibModule`` that have been imported"; the files
below ``src/startup`` see to the import, and the module that defines our model calls this function at its end, so that every
order of imports works.
"""

from __future__ import annotations

import anomalib.models
from anomalib.models import AnomalibModule


def register_models(*models: type[AnomalibModule]) -> None:
    """Make models attributes of ``anomalib.models``, and our package one that ``get_model`` may load from.

    ``ALLOWED_MODULES`` keeps anomalib from importing whatever a configuration names; this adds our package alone.
    """
    for model in models:
        setattr(anomalib.models, model.__name__, model)
    anomalib.models.ALLOWED_MODULES.add("kd_multiresolution")
