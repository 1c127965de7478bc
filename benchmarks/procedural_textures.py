"""Endless labelled textures from a few formulas: the pictures the light source is trained on.

A *class* is a family (stripes, cells, fibres, ...) with four fixed numbers, its *recipe*: wavelength, orientation and
two of the family's own. A *picture* is one realisation: place, phase, random elements, colours, lighting, blur and
noise differ from picture to picture. All comes from formulas, so neither a download nor a licence is involved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor
from torch.utils.data import IterableDataset

Array: TypeAlias = npt.NDArray[np.float64]
TAU = 2 * np.pi


@dataclass(frozen=True)
class Canvas:
    """Where one picture is drawn, and with what.

    Attributes:
        u: coordinate across the texture's orientation in wavelengths, (size, size).
        v: coordinate along it, the same.
        a: first number of the family's own, in [0, 1).
        b: second one.
        rng: the picture's own randomness.
    """

    u: Array
    v: Array
    a: float
    b: float
    rng: np.random.Generator

    def points(self, density: float) -> Array:
        """Return random (K, 2) places, ``density`` of them per square wavelength, a little beyond the border."""
        low = np.array([self.u.min(), self.v.min()]) - 1
        high = np.array([self.u.max(), self.v.max()]) + 1
        count = int(np.clip(density * np.prod(high - low), 8, 100))
        return self.rng.uniform(low, high, (count, 2))

    def offsets(self, points: Array) -> tuple[Array, Array]:
        """Return each pixel's (du, dv) from each of (K, 2) points, both (K, size, size)."""
        return self.u - points[:, 0, None, None], self.v - points[:, 1, None, None]

    def noise(self, exponent: float, stretch: float = 1.0) -> Array:
        """Return noise of unit variance, amplitude 1 / frequency ** exponent above one cycle per wavelength.

        Args:
            exponent: how fast the fine detail fades.
            stretch: how many times longer its grain is along v than across.
        """
        size = len(self.u)
        # One pixel's step across and along the texture turns frequencies per pixel into those per wavelength.
        across = np.array([self.u[1, 0] - self.u[0, 0], self.u[0, 1] - self.u[0, 0]])
        along = np.array([self.v[1, 0] - self.v[0, 0], self.v[0, 1] - self.v[0, 0]])
        fy, fx = np.meshgrid(np.fft.fftfreq(size), np.fft.rfftfreq(size), indexing="ij")
        step = np.hypot(*across)
        fu, fv = (fy * d[0] + fx * d[1] for d in (across / step**2, along / step**2))
        amplitude = (1 + fu**2 + (stretch * fv) ** 2) ** (-exponent)
        amplitude[0, 0] = 0
        noise = np.fft.irfft2(np.fft.rfft2(self.rng.standard_normal((size, size))) * amplitude, s=(size, size))
        return np.asarray(noise / (noise.std() + 1e-9))


def _unit(x: Array) -> Array:
    return np.asarray(np.clip(x, 0, 1))


def _wave(x: Array) -> Array:
    return 0.5 + 0.5 * np.sin(TAU * x)


def _triangle(x: Array) -> Array:
    return np.abs(2 * (x % 1) - 1)


def _step(x: Array, softness: float = 0.05) -> Array:
    """Return a soft step from 0 to 1 at x = 0."""
    return _unit(0.5 + x / softness)


def _grating(c: Canvas) -> Array:
    return (_wave(c.u) + c.b * _wave(c.u * (2 + round(2 * c.a)))) / (1 + c.b)


def _stripes(c: Canvas) -> Array:
    return _step(_triangle(c.u) - 0.2 - 0.6 * c.a)


def _checkers(c: Canvas) -> Array:
    return _step(np.sin(TAU * c.u) * np.sin(TAU * c.v * (0.5 + c.a)), 0.2)


def _bricks(c: Canvas) -> Array:
    row = np.floor(c.v)
    across = c.u * (0.35 + 0.6 * c.a) + 0.5 * (row % 2)
    grey = np.sin(row * 12.9898 + np.floor(across) * 78.233) * 43758.5453 % 1
    mortar = 0.04 + 0.12 * c.b
    inside = _step(_triangle(c.v + 0.5) * -1 + 1 - mortar, 0.1) * _step(1 - mortar - _triangle(across + 0.5), 0.1)
    return inside * (0.6 + 0.3 * grey)


def _weave(c: Canvas) -> Array:
    over = (np.floor(c.u) + np.floor(c.v) * (1 + round(2 * c.a))) % 2
    warp, weft = (np.sqrt(1 - (1 - _triangle(x + 0.5)) ** 2 * (0.4 + 0.5 * c.b)) for x in (c.u, c.v))
    return np.where(over > 0, warp, 0.8 * weft)


def _lattice(c: Canvas) -> Array:
    shift = 0.5 * (np.floor(c.v) % 2) if c.a > 0.5 else 0.0
    distance = np.hypot((c.u + shift) % 1 - 0.5, c.v % 1 - 0.5)
    return _step(0.15 + 0.25 * c.b - distance, 0.1)


def _rings(c: Canvas) -> Array:
    centre = c.points(0.01)[0]
    return _wave(np.hypot(c.u - centre[0], (c.v - centre[1]) * (0.4 + c.a)))


def _zigzag(c: Canvas) -> Array:
    return _step(_triangle(c.u + (0.3 + c.a) * _triangle(c.v * (0.3 + 0.7 * c.b))) - 0.5, 0.3)


def _triangles(c: Canvas) -> Array:
    waves = sum(np.sin(TAU * (c.u * np.cos(t) + c.v * np.sin(t))) for t in (0.0, TAU / 6, TAU / 3))
    return _step(np.asarray(waves) * (1 if c.b > 0.5 else -1) - c.a, 1.5)


def _marble(c: Canvas) -> Array:
    return _wave(c.u + (0.2 + 0.6 * c.a) * c.noise(0.8 + c.b))


def _cloud(c: Canvas) -> Array:
    return 0.5 + 0.22 * c.noise(0.3 + 0.9 * c.a)


def _grain(c: Canvas) -> Array:
    return 0.5 + 0.22 * c.noise(0.6 + 0.8 * c.a, stretch=2 + 6 * c.b)


def _blobs(c: Canvas) -> Array:
    return _step(c.noise(1.2 + c.b) + 1.2 * (c.a - 0.5), 0.4)


def _ridges(c: Canvas) -> Array:
    return 1 - np.minimum(np.abs(c.noise(0.9 + 0.8 * c.a, stretch=1 + 3 * c.b)), 1)


def _cells(c: Canvas) -> Array:
    points = c.points(0.5 + c.a)
    du, dv = c.offsets(points)
    distance = du**2 + (dv * (0.5 + c.b)) ** 2
    nearest = distance.argmin(0)
    return np.asarray(c.rng.uniform(0, 1, len(points))[nearest])


def _cobbles(c: Canvas) -> Array:
    points = c.points(0.5 + c.a)
    du, dv = c.offsets(points)
    distance = np.sqrt(np.partition(du**2 + (dv * (0.5 + c.b)) ** 2, 1, axis=0)[:2])
    grey = c.rng.uniform(0.5, 1)
    return np.asarray(np.sqrt(_unit((distance[1] - distance[0]) * 3)) * grey)


def _pits(c: Canvas) -> Array:
    du, dv = c.offsets(c.points(0.4 + c.a))
    return _unit(np.sqrt((du**2 + (dv * (0.5 + c.b)) ** 2).min(0)))


def _leaves(c: Canvas) -> Array:
    """Ellipses that hide one another, each lit from one side: stones, leaves, scales."""
    points = c.points(1.5 + 2 * c.a)
    du, dv = c.offsets(points)
    count = len(points)
    radius = c.rng.uniform(0.3, 0.8, (count, 1, 1))
    turn = c.rng.uniform(0, TAU, (count, 1, 1))
    along, across = du * np.cos(turn) + dv * np.sin(turn), dv * np.cos(turn) - du * np.sin(turn)
    inside = along**2 + (across * (1 + 2 * c.b)) ** 2 < radius**2
    top = inside.argmax(0)[None]
    shade = c.rng.uniform(0.3, 0.9, (count, 1, 1)) + 0.25 * du / radius
    return np.where(inside.any(0), np.take_along_axis(shade, top, 0)[0], 0.1)


def _fibres(c: Canvas) -> Array:
    """Straight strokes, their directions spread about the texture's: grass, hair, straw, scratches."""
    points = c.points(1.5 + 2 * c.a)
    du, dv = c.offsets(points)
    turn = c.rng.normal(0, 0.1 + 0.9 * c.b, (len(points), 1, 1))
    along, across = dv * np.cos(turn) + du * np.sin(turn), du * np.cos(turn) - dv * np.sin(turn)
    inside = (np.abs(along) < 0.9) & (np.abs(across) < 0.07)
    grey = c.rng.uniform(0.3, 1, len(points))
    return np.where(inside.any(0), grey[inside.argmax(0)], 0.15)


def _spots(c: Canvas) -> Array:
    points = c.points(0.3 + 0.7 * c.a)
    du, dv = c.offsets(points)
    radius = c.rng.uniform(0.1, 0.2 + 0.3 * c.b, (len(points), 1, 1))
    return np.asarray(_step(radius - np.hypot(du, dv), 0.1).max(0))


def _polygons(c: Canvas) -> Array:
    """Polygons with three to six sides, side by side and one over the other."""
    points = c.points(0.5 + 0.7 * c.a)
    du, dv = c.offsets(points)
    count, sides = len(points), 3 + round(3 * c.b)
    angles = c.rng.uniform(0, TAU, (count, 1, 1))
    normals = [angles + TAU * k / sides for k in range(sides)]
    reach = np.max([du * np.cos(normal) + dv * np.sin(normal) for normal in normals], 0)
    inside = reach < 0.35
    grey = c.rng.uniform(0.3, 1, count)
    return np.where(inside.any(0), grey[inside.argmax(0)], 0.1)


def _curls(c: Canvas) -> Array:
    level = c.noise(1.5 + c.a) * (1 + 2 * c.b)
    return 1 - _step(np.abs((level % 1) - 0.5) - 0.12, 0.1)


FAMILIES: tuple[Callable[[Canvas], Array], ...] = (
    _grating, _stripes, _checkers, _bricks, _weave, _lattice, _rings, _zigzag, _triangles, _marble, _cloud, _grain,
    _blobs, _ridges, _cells, _cobbles, _pits, _leaves, _fibres, _spots, _polygons, _curls,
)  # fmt: skip


def recipes(per_family: int, seed: int) -> Array:
    """Return each class's four numbers in [0, 1), (len(FAMILIES) * per_family, 4), a family's classes in a row."""
    return np.random.default_rng(seed).random((len(FAMILIES) * per_family, 4))


def draw(family: Callable[[Canvas], Array], recipe: Array, size: int, rng: np.random.Generator) -> Array:
    """Return one picture of a class, (3, size, size) in [0, 1].

    Args:
        family: one of :data:`FAMILIES`.
        recipe: the class's four numbers.
        size: edge in pixels.
        rng: the picture's randomness.
    """
    wavelength = 5.0 * 5.0 ** recipe[0] * rng.uniform(0.88, 1.14)
    angle = np.pi * recipe[1] + rng.normal(0, 0.1)
    y, x = np.mgrid[:size, :size] / wavelength
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    phase = rng.uniform(0, 64, 2)
    return _photograph(family(Canvas(u + phase[0], v + phase[1], recipe[2], recipe[3], rng)), rng)


def _photograph(grey: Array, rng: np.random.Generator) -> Array:
    """Give a texture (H, W) two colours, light from one side, blur and grain: (3, H, W) in [0, 1].

    The texture is strong and the grain over it may be, so that a network that tells textures apart learns to leave
    faint grain alone. Taught on faint textures instead, it answers to the grain of every even surface.
    """
    dark = rng.uniform(0, 0.5)
    ends = np.array([[dark], [rng.uniform(dark + 0.35, 1)]]) + (rng.random() < 0.4) * rng.normal(0, 0.2, (2, 3))
    ends = np.broadcast_to(ends, (2, 3))[:: rng.choice([1, -1])]
    gamma = _unit(grey) ** np.exp(rng.normal(0, 0.3))
    gamma = gaussian_filter(gamma, rng.uniform(0, 0.9)) if rng.random() < 0.5 else gamma
    colour = ends[0, :, None, None] + (ends[1] - ends[0])[:, None, None] * gamma
    ramp = np.linspace(-0.5, 0.5, len(grey))
    light = 1 + rng.normal(0, 0.2) * ramp[:, None] + rng.normal(0, 0.2) * ramp
    grain = gaussian_filter(rng.standard_normal(grey.shape), rng.uniform(0, 1.2))
    return _unit(colour * light + rng.uniform(0, 0.1) * grain / grain.std())


class ProceduralTextures(IterableDataset[tuple[Tensor, int]]):
    """An endless stream of labelled pictures.

    Args:
        classes: the classes' recipes, from :func:`recipes`.
        size: edge of a picture in pixels.
        seed: of the stream; each data loader worker draws its own part of it.

    Yields:
        A picture (3, size, size), float32 in [0, 1], and its class.
    """

    def __init__(self, classes: Array, size: int, seed: int) -> None:
        super().__init__()
        self.classes, self.size, self.seed = classes, size, seed

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        worker = torch.utils.data.get_worker_info()
        rng = np.random.default_rng([self.seed, worker.id if worker else 0])
        per_family = len(self.classes) // len(FAMILIES)
        while True:
            label = int(rng.integers(len(self.classes)))
            picture = draw(FAMILIES[label // per_family], self.classes[label], self.size, rng)
            yield torch.from_numpy(picture.astype(np.float32)), label
