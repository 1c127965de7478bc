"""A source for tests: VGG-13's plan at an eighth of its widths, as one more model of timm's, ``small_vgg``.

Its "trained" weights are random ones of a seed of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models import VGG, generate_default_cfgs, register_model
from timm.models._builder import build_model_with_cfg
from torch import Tensor

PLAN = [16, 16, "M", 32, 32, "M", 64, 64, "M", 96, 96, "M", 128, 128, "M"]
HEAD = {"num_classes": 1, "mlp_ratio": 0.001}


def _trained() -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2011)
        return VGG(PLAN, **HEAD).state_dict()


default_cfgs = generate_default_cfgs(
    {
        "small_vgg": {
            "state_dict": _trained(), "mean": (0.4, 0.45, 0.5), "std": (0.25, 0.3, 0.35), "num_classes": 1,
            "first_conv": "features.0", "classifier": "head.fc",
        }
    }
)  # fmt: skip


@register_model
def small_vgg(pretrained: bool = False, **kwargs: Any) -> VGG:
    """Return the network, as timm's own entry points do."""
    feature_cfg = {"flatten_sequential": True, "out_indices": (0, 1, 2, 3, 4, 5)}
    return build_model_with_cfg(
        VGG, "small_vgg", pretrained, model_cfg=PLAN, feature_cfg=feature_cfg, **{**HEAD, **kwargs}
    )
