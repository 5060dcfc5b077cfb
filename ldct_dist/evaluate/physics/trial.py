"""A phantom with known edges and lesions, for what patients cannot tell: TTF and d'.

It gets a case's voxels and kernel, and as much noise as the case has at low dose; each method then denoises it like a
patient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ldct_dist.ct import noise
from ldct_dist.ct.dose import DoseConfig, matched, simulate_full_dose
from ldct_dist.ct.phantom import Disc, discs
from ldct_dist.ct.volume import Volume
from ldct_dist.errors import UserError
from ldct_dist.evaluate.physics.observer import Detectability, detectability, laguerre_gauss
from ldct_dist.evaluate.physics.ttf import Transfer, transfer

_SHAPE = (15, 160, 160)
_TISSUE_HU = 50.0
_CONTRASTS_HU = (-150.0, 40.0, 120.0, 400.0)
_EVERY = 3  # slices: nearer ones share their noise once a 3-D denoiser has seen them

Denoise = Callable[[Volume], np.ndarray]


@dataclass(frozen=True)
class Trial:
    """Two scans at low dose: rods of several contrasts, and lesions of one size and contrast.

    present, absent: where there is a lesion and where not, (row, column) voxels.
    """

    rods: Volume
    edges: tuple[Disc, ...]
    lesions: Volume
    lesion_mm: float
    present: tuple[tuple[int, int], ...]
    absent: tuple[tuple[int, int], ...]

    def transfers(self, denoise: Denoise) -> list[Transfer]:
        """The TTF at each contrast."""
        mean = denoise(self.rods).mean(axis=0, dtype=np.float64)
        _, dy, dx = self.rods.spacing
        middle = [(n - 1) / 2 for n in mean.shape]
        return [
            transfer(mean, (dy, dx), (middle[0] + rod.y_mm / dy, middle[1] + rod.x_mm / dx), rod.radius_mm)
            for rod in self.edges
        ]

    def detection(self, denoise: Denoise) -> Detectability:
        """How well the observer tells patches with a lesion from those without."""
        image = denoise(self.lesions)[::_EVERY]
        size = _patch(self.lesion_mm, self.lesions.spacing)
        channels = laguerre_gauss(size, self.lesions.spacing[1:], self.lesion_mm)

        def cut(places: tuple[tuple[int, int], ...]) -> np.ndarray:
            half = size // 2
            return np.concatenate(
                [image[:, y - half : y + half + 1, x - half : x + half + 1] for y, x in places]
            )

        return detectability(cut(self.present), cut(self.absent), channels)


def make_trial(full: Volume, low: Volume, lesion_mm: float, lesion_hu: float, seed: int = 0) -> Trial:
    """The phantom as the scanner of this case would show it.

    lesion_mm, lesion_hu: diameter of the lesions, and their contrast to the tissue around them.
    Raises UserError where the case shows too little soft tissue to measure its kernel and noise, and for lesions that
    are under 3 voxels wide or too wide for the phantom.
    """
    spacing = full.spacing
    if not 3 * max(spacing[1:]) <= lesion_mm:
        raise UserError(f"lesion of {lesion_mm:g} mm: give at least 3 voxels, {3 * max(spacing[1:]):.2g} mm")
    radius = 0.46 * _SHAPE[1] * min(spacing[1:])
    body = Disc(0, 0, radius, _TISSUE_HU)
    rods = tuple(
        Disc(
            0.52 * radius * math.cos(angle),
            0.52 * radius * math.sin(angle),
            0.17 * radius,
            _TISSUE_HU + contrast,
        )
        for angle, contrast in zip(np.arange(4) * math.pi / 2, _CONTRASTS_HU, strict=True)
    )
    present, absent = _places(lesion_mm, spacing, radius)
    middle = [(n - 1) / 2 for n in _SHAPE[1:]]
    lesions = [
        Disc(
            (x - middle[1]) * spacing[2], (y - middle[0]) * spacing[1], lesion_mm / 2, _TISSUE_HU + lesion_hu
        )
        for y, x in present
    ]
    config = _as_noisy(low, matched(full, DoseConfig()), discs((8, *_SHAPE[1:]), spacing, [body]))
    scans = [
        simulate_full_dose(_as_sharp(discs(_SHAPE, spacing, [body, *filled]), config), seed + i, config)
        for i, filled in enumerate((rods, lesions))
    ]
    return Trial(scans[0], rods, scans[1], lesion_mm, present, absent)


def _as_noisy(low: Volume, config: DoseConfig, plain: Volume) -> DoseConfig:
    """`config` with so many photons that tissue in the phantom is as noisy as in the low dose."""
    wanted = _noise(low)
    found = _noise(simulate_full_dose(plain, 0, config))
    assert config.photons is not None
    return config.model_copy(update={"photons": config.photons * (found / wanted) ** 2})


def _noise(volume: Volume) -> float:
    moments = noise.local_moments(volume.hu, volume.spacing)
    soft = moments.homogeneous
    if soft is None:
        raise UserError("phantom trial: too little soft tissue to measure the low dose's noise")
    return noise.noise_std(moments, soft)


def _as_sharp(phantom: Volume, config: DoseConfig) -> Volume:
    """`phantom` under the kernel that its noise will have: the Hann window up to the cutoff."""
    assert config.cutoff_per_mm is not None
    fy, fx = (np.fft.fftfreq(n, mm) for n, mm in zip(phantom.shape[1:], phantom.spacing[1:], strict=True))
    f = np.hypot(fy[:, None], fx).clip(max=config.cutoff_per_mm)
    window = 0.5 + 0.5 * np.cos(math.pi * f / config.cutoff_per_mm)
    blurred = np.fft.ifft2(np.fft.fft2(phantom.hu[0]) * window).real
    return replace(phantom, hu=np.repeat(np.rint(blurred).astype(np.int16)[None], len(phantom.hu), axis=0))


def _patch(lesion_mm: float, spacing: tuple[float, float, float]) -> int:
    """Odd, and two and a half lesions wide."""
    return 2 * round(1.25 * lesion_mm / min(spacing[1:])) + 1


def _places(
    lesion_mm: float, spacing: tuple[float, float, float], radius: float
) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]:
    """Voxels with and without a lesion, like the fields of a chess board, patches apart and inside the phantom."""
    size = _patch(lesion_mm, spacing)
    rows, columns = _SHAPE[1:]
    reach = radius / min(spacing[1:]) - size
    found: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
    count = int(2 * reach // size)
    for i in range(count):
        for j in range(count):
            dy, dx = ((k - (count - 1) / 2) * size for k in (i, j))
            if math.hypot(dy, dx) <= reach:
                found[(i + j) % 2].append((round(rows / 2 + dy), round(columns / 2 + dx)))
    if min(map(len, found)) < 4:
        raise UserError(
            f"lesion of {lesion_mm:g} mm: too wide for the phantom of {2 * radius:.0f} mm; give a smaller"
        )
    return tuple(found[0]), tuple(found[1])
