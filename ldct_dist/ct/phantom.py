"""Objects whose HU are known: for the image physics of reports, for tests, and for benches without a scan at hand.

Noise-free; `ldct_dist.ct.dose.simulate_full_dose` makes a scan of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ldct_dist.ct.volume import AIR_HU, Volume

_AIR = -1000.0
_BALL_CUTS = 8  # in each slice
_SUBSAMPLES = 3  # of organs, along each in-plane axis, so that edges are partial volumes as in a scan


def water_cylinder(
    shape: tuple[int, int, int], spacing: tuple[float, float, float], radius_mm: float
) -> Volume:
    """A cylinder of water (0 HU) in air (-1000 HU) along z, around the centre of the slice."""
    hu = discs(shape, spacing, [Disc(0, 0, radius_mm, 0)])
    return Volume(np.rint(hu).astype(np.int16), spacing)


@dataclass(frozen=True)
class Disc:
    """A cylinder along z. x_mm, y_mm: its axis, from the slice's centre, y downwards. hu: of its inside."""

    x_mm: float
    y_mm: float
    radius_mm: float
    hu: float


def discs(
    shape: tuple[int, int, int], spacing: tuple[float, float, float], filled: Sequence[Disc]
) -> np.ndarray:
    """HU (z, y, x), float64, of discs in air (-1000 HU), each of which covers those before it; all slices are alike.

    Each voxel's share of a disc is exact. HU are not rounded, which would lose the rims of faint lesions.
    """
    hu = np.full(shape[1:], _AIR)
    y, x = (_borders(n, mm) for n, mm in zip(shape[1:], spacing[1:], strict=True))
    for disc in filled:
        hu += (disc.hu - hu) * _share_of_disc(y - disc.y_mm, x - disc.x_mm, disc.radius_mm)
    return np.repeat(hu[None], shape[0], axis=0)


def ball(diameter_mm: float, spacing: tuple[float, float, float]) -> np.ndarray:
    """Share of each voxel that lies in a ball around the middle of the middle voxel: float (z, y, x), odd sizes.

    Exact in plane; along z the sum of Gauss and Legendre's rule, which is exact for the area of a ball's cuts.
    """
    radius = diameter_mm / 2
    z, y, x = (_borders(2 * math.ceil(radius / mm) + 1, mm) for mm in spacing)
    at, weight = np.polynomial.legendre.leggauss(_BALL_CUTS)
    share = np.zeros((len(z) - 1, len(y) - 1, len(x) - 1))
    reached = z.clip(-radius, radius)
    for slice_, bottom, top in zip(share, reached[:-1], reached[1:], strict=True):
        half = (top - bottom) / 2
        for height, length in zip((bottom + top) / 2 + half * at, half * weight, strict=True):
            if length > 0:
                cut = math.sqrt(radius**2 - height**2)
                slice_ += length / spacing[0] * _share_of_disc(y, x, cut)
    return share


def body(shape: tuple[int, int, int], spacing: tuple[float, float, float], seed: int) -> Volume:
    """An abdomen: fat, muscle, liver with lesions, spleen, kidneys, aorta, spine, gas; padding in the corners.

    `seed` moves and resizes the organs and places the lesions, so every seed is another patient. Every organ is an
    ellipsoid; the padding (AIR_HU) is what lies outside the circle that fits into the slice.
    """
    rng = np.random.default_rng(seed)
    hu = np.full(shape, _AIR, np.float32)
    x, y = _in_plane(shape, spacing)
    z = (np.arange(shape[0]) - (shape[0] - 1) / 2) * spacing[0]
    height, width = shape[1] * spacing[1], shape[2] * spacing[2]
    half_x, half_y = 0.42 * width * rng.uniform(0.92, 1), 0.30 * height * rng.uniform(0.92, 1)
    half_z = shape[0] * spacing[0] / 2

    def put(value: float, centre: tuple[float, float, float], half: tuple[float, float, float]) -> None:
        """An ellipsoid of `value` HU; centre and half axes (x, y, z) as fractions of the body's half axes."""
        jitter = rng.uniform(-0.02, 0.02, 3)
        grow = rng.uniform(0.92, 1.08)
        u = (x / half_x - centre[0] - jitter[0]) / (half[0] * grow)
        v = (y / half_y - centre[1] - jitter[1]) / (half[1] * grow)
        w = (z / half_z - centre[2] - jitter[2]) / (half[2] * grow)
        in_plane = u * u + v * v
        for i in np.flatnonzero(np.abs(w) < 1):
            part = _mean_of_subsamples(in_plane < 1 - w[i] ** 2)
            hu[i] += (value - hu[i]) * part

    endless = 1e6
    put(-100, (0, 0, 0), (0.98, 0.98, endless))  # fat
    put(55, (0, 0, 0), (0.86, 0.82, endless))  # muscle
    put(-90, (0.05, -0.08, 0), (0.72, 0.62, endless))  # visceral fat
    put(105, (-0.36, -0.12, 0.3), (0.36, 0.50, 1.1))  # liver, on the image's left
    for _ in range(6):
        dx, dy, dz = rng.uniform(-0.22, 0.22, 3)
        radius = rng.uniform(0.02, 0.06)
        put(
            rng.uniform(40, 80),
            (-0.36 + dx, -0.12 + dy, 0.3 + dz),
            (radius, radius * half_x / half_y, radius * half_x / half_z),
        )
    put(115, (0.50, 0.05, 0.4), (0.15, 0.28, 0.7))  # spleen
    for side in (-1, 1):
        put(170, (0.38 * side, 0.35, -0.3), (0.11, 0.20, 0.6))  # kidney
        put(60, (0.22 * side, 0.50, 0), (0.12, 0.20, endless))  # psoas
    put(220, (0.05, 0.30, 0), (0.065, 0.10, endless))  # aorta
    put(300, (0, 0.58, 0), (0.14, 0.20, endless))  # vertebral body: cancellous bone
    put(20, (0, 0.76, 0), (0.05, 0.06, endless))  # spinal canal
    put(900, (0, 0.89, 0), (0.03, 0.05, endless))  # spinous process: cortical bone
    for _ in range(4):
        centre = (rng.uniform(-0.1, 0.5), rng.uniform(-0.5, -0.2), rng.uniform(-1, 1))
        put(rng.choice([-950.0, 45.0]), centre, (0.10, 0.14, 0.3))  # bowel: gas or fluid

    outside = _mean_of_subsamples(x * x + y * y < (min(height, width) / 2) ** 2) < 0.5
    hu[:, outside] = AIR_HU
    return Volume(np.rint(hu).astype(np.int16), spacing)


def _borders(count: int, mm: float) -> np.ndarray:
    """(count + 1,) the borders of voxels along an axis, mm from its middle."""
    return (np.arange(count + 1) - count / 2) * mm


def _share_of_disc(y: np.ndarray, x: np.ndarray, radius: float) -> np.ndarray:
    """Share of each voxel between borders y (Y + 1,) and x (X + 1,) that a disc around (0, 0) covers: (Y, X), exact.

    From the disc's area below and left of each corner: the integral, along x, of its chord's length below y.
    """
    voxel = np.diff(y)[:, None] * np.diff(x)
    y, x = y.clip(-radius, radius)[:, None], x.clip(-radius, radius)

    def half_chord(u: np.ndarray) -> np.ndarray:
        return np.sqrt((radius**2 - u**2).clip(min=0))  # rounding may take it below 0

    def under_arc(u: np.ndarray) -> np.ndarray:
        """The integral of half a chord from 0 to u."""
        return (u * half_chord(u) + radius**2 * np.arcsin((u / radius).clip(-1, 1))) / 2

    width = half_chord(y)  # beyond it, the chord is all below y, or none of it
    inner = x.clip(-width, width)
    area = y * (inner + width) + under_arc(inner) + under_arc(width)
    beyond = under_arc(x) - under_arc(inner) + under_arc(np.array(radius)) - under_arc(width)
    area += np.where(y > 0, 2 * beyond, 0)
    return np.diff(np.diff(area, axis=0), axis=1) / voxel


def _in_plane(
    shape: tuple[int, int, int], spacing: tuple[float, float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """x (1, X) and y (Y, 1) of the subsamples, mm from the slice's centre, y downwards."""
    y, x = (
        (np.arange(n * _SUBSAMPLES) - (n * _SUBSAMPLES - 1) / 2) * (mm / _SUBSAMPLES)
        for n, mm in zip(shape[1:], spacing[1:], strict=True)
    )
    return x[None, :], y[:, None]


def _mean_of_subsamples(inside: np.ndarray) -> np.ndarray:
    """Share of each voxel that is inside: (3 y, 3 x) bool -> (y, x)."""
    rows, columns = (n // _SUBSAMPLES for n in inside.shape)
    return inside.reshape(rows, _SUBSAMPLES, columns, _SUBSAMPLES).mean((1, 3))
