"""The two variants of the model, and which arguments either knows."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

# What the other variant alone knows, by variant.
OTHER_VARIANTS_ARGUMENTS = {
    "paper": ("image_score", "false_alarm_rate"),
    "dual": (
        "score_points",
        "cloner",
        "cloner_bias",
        "cloner_batch_norm",
        "terms",
        "value_weight",
        "anomaly_map",
        "attribution_path",
        "smooth_grad_samples",
        "smooth_grad_noise",
        "smooth_grad_as_published",
        "explicit_backward",
        "chunk_size",
        "percentile_scale",
    ),
}


def check_variant(variant: str, given: Mapping[str, object], function: Callable[..., Any]) -> None:
    """Check that no argument was given that the variant does not know.

    Args:
        variant: ``paper`` or ``dual``.
        given: the arguments' values by name.
        function: what they were given to; an argument that has its default there counts as not given.

    Raises:
        ValueError: if one differs from its default, or the variant does not exist.
    """
    if variant not in OTHER_VARIANTS_ARGUMENTS:
        msg = f"variant={variant!r}: expected one of {', '.join(OTHER_VARIANTS_ARGUMENTS)}."
        raise ValueError(msg)
    parameters = inspect.signature(function).parameters
    for name in OTHER_VARIANTS_ARGUMENTS[variant]:
        if given[name] != parameters[name].default:
            other = next(other for other in OTHER_VARIANTS_ARGUMENTS if other != variant)
            msg = f"{name}={given[name]!r}: variant={variant!r} has no such argument. Leave it out, or use {other!r}."
            raise ValueError(msg)
