"""Defects drawn onto clean grey pictures, each with the exact mask of the pixels it changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.ndimage import binary_closing, gaussian_filter

Grey: TypeAlias = npt.NDArray[np.uint8]
Mask: TypeAlias = npt.NDArray[np.bool_]
Array: TypeAlias = npt.NDArray[np.float64]

VISIBLE = 4
"""A pixel counts as changed from this difference in grey levels (of 255) on; no defect leaves a smaller one behind."""


def _unit(x: Array) -> Array:
    return np.asarray(np.clip(x, 0, 1))


def _blur(picture: Array, sigma: float) -> Array:
    return np.asarray(gaussian_filter(picture, sigma))


def _distances(shape: tuple[int, ...], centre: Array) -> tuple[Array, Array]:
    """Return each pixel's (dy, dx) from a place, both (H, W)."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    return y - centre[0], x - centre[1]


def _centre(shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Return a random place (y, x) in the inner part of the picture, so that the defect is not cut off."""
    return np.asarray(rng.uniform(0.25, 0.75, 2) * shape)


def _patch(shape: tuple[int, ...], rng: np.random.Generator, radius: float) -> Array:
    """Return the opacity (H, W) in [0, 1] of a roundish patch with an uneven, slightly soft border."""
    dy, dx = _distances(shape, _centre(shape, rng))
    stretch = rng.uniform(0.75, 1.3)
    bumps = _blur(rng.standard_normal(shape), radius / 3)
    reach = np.hypot(dy * stretch, dx / stretch) / radius + 0.25 * bumps / bumps.std()
    return _unit((1 - reach) * radius / 3 + 0.5)


def _sign(rng: np.random.Generator) -> float:
    return float(rng.choice([-1.0, 1.0]))


def _levels(clean: Array, contrasts: float) -> float:
    """Return so many times the ground's own contrast in grey levels: what shows on a brick is lost in the grass."""
    return float(contrasts * clean.std())


def _scratch(clean: Array, strength: float, rng: np.random.Generator, _: Array) -> Array:
    """A thin, slightly bent line, brighter or darker than the ground."""
    dy, dx = _distances(clean.shape, _centre(clean.shape, rng))
    angle = rng.uniform(0, np.pi)
    along, across = dx * np.cos(angle) + dy * np.sin(angle), dy * np.cos(angle) - dx * np.sin(angle)
    half = rng.uniform(0.22, 0.38) * len(clean)
    bend = across - rng.uniform(-0.15, 0.15) * along**2 / half
    line = _unit(1.55 + 0.35 * strength - np.abs(bend)) * _unit(half - np.abs(along))
    return clean + _sign(rng) * _levels(clean, 2.7 + 1.3 * strength) * line


def _stain(clean: Array, strength: float, rng: np.random.Generator, _: Array) -> Array:
    """A patch that is evenly darker or brighter, the texture showing through."""
    opacity = _patch(clean.shape, rng, rng.uniform(0.1, 0.16) * len(clean))
    return clean + _sign(rng) * _levels(clean, 1.7 + 0.9 * strength) * opacity


def _spots(clean: Array, strength: float, rng: np.random.Generator, _: Array) -> Array:
    """A handful of small dark or bright dots."""
    drawn, sign, middle = clean.copy(), _sign(rng), _centre(clean.shape, rng)
    for _dot in range(rng.integers(4, 8)):
        dy, dx = _distances(clean.shape, middle + rng.normal(0, 0.1 * len(clean), 2))
        dot = _unit(rng.uniform(2.0, 3.5) - np.hypot(dy, dx) + 0.5)
        drawn += dot * (clean + sign * _levels(clean, 3.0 + 1.3 * strength) - drawn)
    return drawn


def _foreign(clean: Array, strength: float, rng: np.random.Generator, foreign: Array) -> Array:
    """A patch of another texture, its brightness and (the weaker, the more) its contrast fitted to the ground's."""
    opacity = _patch(clean.shape, rng, (0.12 + 0.07 * strength) * len(clean))
    inside = opacity > 0
    contrast = float(clean[inside].std() / (foreign[inside].std() + 1e-9))
    fitted = (foreign - foreign[inside].mean()) * contrast ** (1 - strength) + clean[inside].mean()
    return np.asarray(clean + opacity * (fitted - clean))


def _smudge(clean: Array, strength: float, rng: np.random.Generator, _: Array) -> Array:
    """A wiped patch: blurred and a little darker."""
    opacity = _patch(clean.shape, rng, (0.13 + 0.06 * strength) * len(clean))
    return clean + opacity * (_blur(clean, 2 + 2 * strength) - 8 - 8 * strength - clean)


def _dent(clean: Array, strength: float, rng: np.random.Generator, _: Array) -> Array:
    """A hollow under slanting light: bright on one side, dark on the other."""
    dy, dx = _distances(clean.shape, _centre(clean.shape, rng))
    angle, radius = rng.uniform(0, 2 * np.pi), rng.uniform(0.13, 0.19) * len(clean)
    inside = _unit(1 - (dx**2 + dy**2) / radius**2)
    slope = (dx * float(np.cos(angle)) + dy * float(np.sin(angle))) / radius * inside
    return clean + _levels(clean, 5.4 + 2.8 * strength) * slope


KINDS: dict[str, Callable[[Array, float, np.random.Generator, Array], Array]] = {
    "dent": _dent,
    "foreign": _foreign,
    "scratch": _scratch,
    "smudge": _smudge,
    "spots": _spots,
    "stain": _stain,
}


def draw_defect(kind: str, clean: Grey, strength: float, rng: np.random.Generator, foreign: Grey) -> tuple[Grey, Mask]:
    """Draw one defect.

    Args:
        kind: one of :data:`KINDS`.
        clean: the picture without defect, (H, W), uint8.
        strength: from 0, seen on looking, to 1, seen at a glance.
        rng: place, shape and sign.
        foreign: a piece of another texture, of the same shape; only ``"foreign"`` uses it.

    Returns:
        The picture with its defect, (H, W), uint8, and the mask, (H, W), bool: True exactly where the two pictures
        differ, which is everywhere by at least :data:`VISIBLE` grey levels.

    Raises:
        ValueError: if the kind does not exist or the strength is outside [0, 1].
    """
    if kind not in KINDS:
        msg = f"kind={kind!r}: expected one of {', '.join(KINDS)}."
        raise ValueError(msg)
    if not 0 <= strength <= 1:
        msg = f"strength={strength}: expected a number from 0 to 1."
        raise ValueError(msg)
    ground = clean.astype(np.float64)
    drawn = np.clip(KINDS[kind](ground, strength, rng, foreign.astype(np.float64)), 0, 255)
    change = np.rint(drawn) - ground
    # Inside a defect single pixels can keep their grey by chance. They belong to it: the gaps are closed, and the
    # pixels in them are moved by the least visible amount, away from the end of the scale.
    changed = np.abs(change) >= VISIBLE
    mask = changed | binary_closing(changed, iterations=2)
    least = np.where(ground < 128, VISIBLE, -VISIBLE)
    change = np.where(changed, change, least) * mask
    return (ground + change).astype(np.uint8), mask
