"""The simulated scanner: its geometry, the share of its photons that arrives, and its noise in HU."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch.nn import functional

from ldct_dist.ct.dose_config import DoseConfig
from ldct_dist.ct.projector import Scan, filtered_backprojection, forward
from ldct_dist.ct.volume import Volume

_SOURCE_MM = 595.0
_LEAST = 1e-6
"""Share of the photons that every ray detects at least, by scatter: as many as after 72 cm of water."""


def scan_of(volume: Volume, config: DoseConfig) -> Scan:
    """The scan of one slice of `volume` that `config` describes."""
    matrix = max(volume.shape[1:])
    return Scan(
        beam=config.beam,
        views=config.views or 2 * matrix,
        columns=config.columns or 2 * matrix,
        source_mm=config.source_mm or volume.acquisition.source_mm or _SOURCE_MM,
        shape=volume.shape[1:],
        spacing=volume.spacing[1:],
    )


def line_integrals(
    hu: np.ndarray, scan: Scan, config: DoseConfig, device: torch.device | str
) -> torch.Tensor:
    """p of every ray, (slices, views, columns), for slices (slices, y, x) in HU.

    Projected at some 128 views and half of the columns, then interpolated: only the variance comes from p, and p is
    smooth.
    """
    mu = (torch.from_numpy(hu).to(device).float() / 1000 + 1).clamp(min=0) * config.water_per_mm
    coarse = forward(mu, scan.coarse(max(1, scan.views // 128), 2), step_mm=2 * min(scan.spacing))
    size = (scan.views, scan.columns)
    return functional.interpolate(coarse[:, None], size, mode="bilinear", align_corners=False)[:, 0]


def transmission(integrals: torch.Tensor, scan: Scan, config: DoseConfig) -> torch.Tensor:
    """Share of `config.photons` that arrives, for line integrals (slices, views, columns).

    It accounts for the patient, the bow-tie filter, modulation of the tube current, and a least share of scatter.
    """
    integrals = integrals.clamp(max=-math.log(_LEAST))
    arriving = torch.exp(-integrals)
    if config.bowtie_mm is not None:
        _, t = scan.rays()
        chord = 2 * (config.bowtie_mm**2 - t.square()).clamp(min=0).sqrt()
        filtered = torch.exp(config.water_per_mm * (chord - 2 * config.bowtie_mm))
        arriving = (arriving * filtered.to(arriving)).clamp(min=_LEAST)
    if config.modulation:
        current = torch.exp(config.modulation * integrals.amax(dim=2, keepdim=True))
        arriving = arriving * (current / current.mean(dim=1, keepdim=True))
    return arriving


def white(
    key: tuple[int, ...], slices: Iterable[int], scan: Scan, device: torch.device | str
) -> torch.Tensor:
    """Standard normal sinograms, (slices, views, columns); slice i's is a function of (key, i).

    Drawn on the CPU, so that CUDA gets the same noise.
    """
    drawn = []
    for i in slices:
        state = np.random.SeedSequence([*key, int(i)]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(state) >> 1)
        drawn.append(torch.randn(scan.views, scan.columns, generator=generator))
    return torch.stack(drawn).to(device)


def hu_noise(sinogram: torch.Tensor, scan: Scan, config: DoseConfig) -> np.ndarray:
    """Noise in line integrals, (slices, views, columns) -> noise in HU, (slices, y, x) float32."""
    mu = filtered_backprojection(shared(sinogram, config.blur_columns), scan, config.cutoff_per_mm)
    return (mu * (1000 / config.water_per_mm)).cpu().numpy()


def shared(sinogram: torch.Tensor, sigma: float) -> torch.Tensor:
    """Every column's signal spread over its neighbours along the view, `sigma` columns wide."""
    if not sigma:
        return sinogram
    reach = math.ceil(4 * sigma)
    line = torch.exp(-(torch.arange(-reach, reach + 1, device=sinogram.device) ** 2) / (2 * sigma**2))
    views = sinogram.flatten(0, 1)[:, None]
    return functional.conv1d(views, (line / line.sum())[None, None], padding=reach).reshape(sinogram.shape)
