"""A phantom with known edges and lesions, for what cannot be measured on patients: TTF and d'.

It has a case's voxel size and kernel, and as much noise as the case has at low dose. Each method denoises it like a
patient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ldct_dist.ct import noise
from ldct_dist.ct.dose import DoseConfig, matched, simulate_full_dose
from ldct_dist.ct.phantom import Disc
from ldct_dist.ct.volume import Volume
from ldct_dist.errors import UserError
from ldct_dist.evaluate.physics.lesions import BALL, ROD, TISSUE_HU, Layout, Place
from ldct_dist.evaluate.physics.observer import Detectability, detectability, laguerre_gauss
from ldct_dist.evaluate.physics.ttf import Transfer, transfer

_CONTRASTS_HU = (-150.0, 40.0, 120.0, 400.0)
_SLICES = 15
_TURNS = 2  # how often each of two scans is made, whose places with and without a lesion are exchanged

Denoise = Callable[[Volume], np.ndarray]


@dataclass(frozen=True)
class Reading:
    """A scan for the observer: places with a lesion at each level, and places without."""

    scan: Volume
    present: tuple[Place, ...]
    absent: tuple[Place, ...]


@dataclass(frozen=True)
class Trial:
    """Scans at low dose, each with noise of its own. edges: of discs of several contrasts. lesions: by shape."""

    edges: Volume
    discs: tuple[Disc, ...]
    layout: Layout
    lesions: dict[str, tuple[Reading, ...]]

    def transfers(self, denoise: Denoise) -> list[Transfer]:
        """The TTF at each contrast."""
        mean = denoise(self.edges).mean(axis=0, dtype=np.float64)
        _, dy, dx = self.edges.spacing
        middle = [(n - 1) / 2 for n in mean.shape]
        return [
            transfer(mean, (dy, dx), (middle[0] + disc.y_mm / dy, middle[1] + disc.x_mm / dx), disc.radius_mm)
            for disc in self.discs
        ]

    def detection(self, denoise: Denoise) -> dict[str, Detectability]:
        """By shape, how well the observer, who sees the slice through a lesion's middle, distinguishes patches with and
        without a lesion. Raises UserError as `detectability` does."""
        half, levels = self.layout.patch // 2, list(self.layout.levels)
        channels = laguerre_gauss(self.layout.patch, self.layout.spacing[1:], self.layout.diameter_mm)

        def cut(image: np.ndarray, places: tuple[Place, ...]) -> list[np.ndarray]:
            return [image[levels, y - half : y + half + 1, x - half : x + half + 1] for y, x in places]

        found = {}
        for shape, readings in self.lesions.items():
            present, absent = [], []
            for reading in readings:
                image = denoise(reading.scan)
                present += cut(image, reading.present)
                absent += cut(image, reading.absent)
            found[shape] = detectability(np.concatenate(present), np.concatenate(absent), channels)
        return found


def make_trial(full: Volume, low: Volume, lesion_mm: float, lesion_hu: float, seed: int) -> Trial:
    """The phantom as the scanner of this case would show it.

    lesion_mm, lesion_hu: diameter of the lesions, and their contrast to the tissue around them. seed: of the noise; take
    another one for each case, or their figures are not independent. Raises UserError if the case has too little soft
    tissue to measure its kernel and noise, and as `Layout` does.
    """
    layout = Layout(lesion_mm, lesion_hu, full.spacing)
    config = _as_noisy(low, matched(full, DoseConfig()), layout)
    scans = 0

    def scan(hu: np.ndarray) -> Volume:
        nonlocal scans
        scans += 1
        return simulate_full_dose(_as_sharp(hu, full.spacing, config), full.spacing, seed + scans, config)

    lesions = {
        shape: tuple(
            Reading(scan(layout.phantom(shape, present)), present, absent)
            for present, absent in (layout.places, layout.places[::-1]) * _TURNS
        )
        for shape in (BALL, ROD)
    }
    discs = _around(layout.body.radius_mm)
    return Trial(scan(layout.slices(_SLICES, discs)), discs, layout, lesions)


def _around(radius_mm: float) -> tuple[Disc, ...]:
    """A disc of each contrast, on a circle in a body of that radius."""
    away = 0.52 * radius_mm
    angles = np.arange(len(_CONTRASTS_HU)) * 2 * math.pi / len(_CONTRASTS_HU)
    return tuple(
        Disc(away * math.cos(angle), away * math.sin(angle), 0.17 * radius_mm, TISSUE_HU + contrast)
        for angle, contrast in zip(angles, _CONTRASTS_HU, strict=True)
    )


def _as_noisy(low: Volume, config: DoseConfig, layout: Layout) -> DoseConfig:
    """`config` with the number of photons at which the phantom's tissue is as noisy as the case's at low dose."""
    wanted = _noise(low)
    found = _noise(simulate_full_dose(layout.slices(8), layout.spacing, 0, config))
    assert config.photons is not None
    return config.model_copy(update={"photons": config.photons * (found / wanted) ** 2})


def _noise(volume: Volume) -> float:
    moments = noise.local_moments(volume.hu, volume.spacing)
    soft = moments.homogeneous
    if soft is None:
        raise UserError("phantom trial: too little soft tissue to measure the low dose's noise")
    if (std := noise.noise_std(moments, soft)) == 0:
        raise UserError("phantom trial: the low dose shows no noise")
    return std


def _as_sharp(hu: np.ndarray, spacing: tuple[float, float, float], config: DoseConfig) -> np.ndarray:
    """The phantom filtered with the kernel of its noise, a Hann window up to the cutoff. HU are not rounded."""
    assert config.cutoff_per_mm is not None
    fy, fx = (np.fft.fftfreq(n, mm) for n, mm in zip(hu.shape[1:], spacing[1:], strict=True))
    f = np.hypot(fy[:, None], fx).clip(max=config.cutoff_per_mm)
    window = 0.5 + 0.5 * np.cos(math.pi * f / config.cutoff_per_mm)
    return np.fft.ifft2(np.fft.fft2(hu) * window).real
