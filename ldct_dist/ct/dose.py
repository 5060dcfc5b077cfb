"""Low dose from full dose: the noise that fewer photons would have added, put in where it arises.

Noise is drawn in the projections and reconstructed, so it has the streaks, the texture and the dependence on
the body that a scan at that dose has. Only the missing noise is added, low = full + FBP(noise), so the mean
and the resolution stay those of the scan. For the dose fraction a and counts L = photons exp(-p) at full dose,
the line integral p gets Gaussian noise of variance

    (1 - a) / (a L) + (1 - a^2) electronic_noise^2 / (a^2 L^2)

(Yu et al., J Comput Assist Tomogr 36 (2012); Zeng et al., IEEE Trans Nucl Sci 62 (2015)).

Not modelled: bow-tie filter, tube-current modulation, scatter, beam hardening, and noise shared between
neighbouring slices of helical scans; the isocentre is taken to be the centre of the slice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import torch
from pydantic import Field
from torch.nn import functional

from ldct_dist.config import Config
from ldct_dist.ct import noise
from ldct_dist.ct.projector import Beam, Scan, backproject, filtered_backprojection, forward, ramp_filter
from ldct_dist.ct.volume import AIR_HU, Volume
from ldct_dist.errors import UserError

_BATCH = 16  # slices that share one working-out of the geometry
_MATCHED_SLICES = 8  # on these the noise of a volume is measured
_CUTOFFS = (0.4, 0.55, 0.75, 1.0, 1.4, 2.0, 4.0)  # of the image's Nyquist frequency, tried on the texture
_LEAST_STD_HU = 0.5  # rounding to whole HU alone makes 0.3


class DoseConfig(Config):
    """The scanner that the simulation assumes.

    beam: "fan" over 360 degrees on an equiangular detector, or "parallel" over 180 degrees.
    views, columns: projections, and detector columns over the slice's diagonal. None: two for each voxel of the
        longer side, near what scanners of a 512 matrix have. Fewer carry the same dose with more photons each.
    source_mm: source to isocentre, mm.
    photons: per ray at full dose, before the patient. None: so many that a full-dose scan of this volume would
        be as noisy as the volume is, so that a quarter is a quarter of this scan's own dose.
    cutoff_per_mm: where the kernel's Hann window reaches zero, cycles/mm. None: such that the noise of in-plane
        neighbours correlates as it does in the volume.
    electronic_noise: standard deviation of the detector's own noise, in photons.
    water_per_mm: attenuation of water, 1/mm; 0.0192 at the mean energy of 120 kVp, about 70 keV.
    """

    beam: Beam = "fan"
    views: int | None = Field(None, ge=16)
    columns: int | None = Field(None, ge=16)
    source_mm: float = Field(595.0, gt=0)
    photons: float | None = Field(None, gt=0)
    cutoff_per_mm: float | None = Field(None, gt=0)
    electronic_noise: float = Field(5.0, ge=0)
    water_per_mm: float = Field(0.0192, gt=0)


_DEFAULTS = DoseConfig()


def simulate_low_dose(
    volume: Volume,
    dose: float,
    seed: int,
    config: DoseConfig = _DEFAULTS,
    device: torch.device | str = "cpu",
) -> Volume:
    """`volume` as it would look at the fraction `dose` of its own dose; the same grid, int16 HU.

    The noise of slice i is drawn from (seed, i) alone. So take another seed for another patient, and for a second
    simulation on top of a first: equal seeds draw equal noise. Voxels at AIR_HU (padding, clipped air) stay there,
    others stop at it. dose=1 gives `volume` itself.

    Raises UserError for a dose outside (0, 1], and where config leaves photons or the cutoff to be matched and the
    volume shows no noise to match.
    """
    if not 0 < dose <= 1:
        raise UserError(
            f"dose {dose}: give the fraction of full dose to keep, above 0 and up to 1, such as 0.25"
        )
    if seed < 0:
        raise UserError(f"seed {seed}: give a whole number from 0 up")
    if dose == 1:
        return volume
    config = matched(volume, config, device)

    def missing(counts: torch.Tensor) -> torch.Tensor:
        quantum = (1 - dose) / (dose * counts)
        electronic = (1 - dose**2) * (config.electronic_noise / (dose * counts)).square()
        return quantum + electronic

    return _with_noise(volume, missing, seed, config, device)


def simulate_full_dose(
    volume: Volume, seed: int, config: DoseConfig, device: torch.device | str = "cpu"
) -> Volume:
    """A noise-free phantom as a scan with `config.photons` would show it: all the noise, 1/L + electronic^2/L^2.

    There is no noise to match either: without a cutoff_per_mm the kernel is the bare ramp.
    """
    if config.photons is None:
        raise UserError("simulating a full-dose scan of a phantom: set photons, for example 2e5")

    def whole(counts: torch.Tensor) -> torch.Tensor:
        return 1 / counts + (config.electronic_noise / counts).square()

    return _with_noise(volume, whole, seed, config, device)


def matched(volume: Volume, config: DoseConfig, device: torch.device | str = "cpu") -> DoseConfig:
    """`config` with photons and cutoff_per_mm filled in from the noise in the volume's soft tissue.

    On up to 8 slices. First the cutoff: the same noise is reconstructed with a ladder of cutoffs, and the one
    is interpolated at which neighbours correlate as in the volume. Then the photons: with unit photons the
    quantum and the electronic noise have the variances q and e in the windows measured, so the noise at full dose is
    std^2 = q / photons + e / photons^2. A given photons or cutoff_per_mm is kept.

    Raises UserError if the volume has too little soft tissue, or noise below 0.5 HU (a phantom, a denoised series).
    """
    if config.photons is not None and config.cutoff_per_mm is not None:
        return config
    some = np.linspace(0, len(volume.hu) - 1, min(_MATCHED_SLICES, len(volume.hu))).round().astype(int)
    hu = volume.hu[some]
    moments = noise.local_moments(hu, volume.spacing)
    where = noise.homogeneous(moments)
    if where is None:
        raise UserError(
            "simulated dose: too little soft tissue to measure the scan's noise; set photons and cutoff_per_mm"
        )
    std = noise.noise_std(moments, where)
    if std < _LEAST_STD_HU:
        raise UserError(
            f"simulated dose: noise of {std:.2f} HU is too little to scale; set photons and cutoff_per_mm"
        )

    # A quarter of the views, each with four times the photons, makes the same noise as far as a window reaches.
    whole = scan_of(volume, config)
    scan = whole.coarse(4, 1)
    transmission = torch.exp(-_line_integrals(hu, scan, config, device))
    quantum = _white((0, 0), some, scan, device) / transmission.sqrt()
    if config.cutoff_per_mm is None:
        correlation = noise.neighbour_correlation(moments, where)
        cutoff = _matching_cutoff(correlation, quantum, where, scan, volume.spacing)
        config = config.model_copy(update={"cutoff_per_mm": cutoff})
    if config.photons is None:
        electronic = config.electronic_noise * _white((0, 1), some, scan, device) / transmission
        both = _hu_noise(torch.cat([quantum, electronic]), scan, config)
        q, e = (
            noise.noise_std(noise.local_moments(hu, volume.spacing), where) ** 2 for hu in np.split(both, 2)
        )
        q, e = (variance * scan.views / whole.views for variance in (q, e))
        photons = (q + (q * q + 4 * std * std * e) ** 0.5) / (2 * std * std)
        config = config.model_copy(update={"photons": photons})
    return config


def scan_of(volume: Volume, config: DoseConfig) -> Scan:
    """The scan of one slice of `volume` that `config` describes."""
    matrix = max(volume.shape[1:])
    return Scan(
        beam=config.beam,
        views=config.views or 2 * matrix,
        columns=config.columns or 2 * matrix,
        source_mm=config.source_mm,
        shape=volume.shape[1:],
        spacing=volume.spacing[1:],
    )


def _with_noise(
    volume: Volume,
    variance: Callable[[torch.Tensor], torch.Tensor],
    seed: int,
    config: DoseConfig,
    device: torch.device | str,
) -> Volume:
    """`volume` plus noise whose line integrals have variance(counts)."""
    assert config.photons is not None
    scan = scan_of(volume, config)
    hu = np.empty_like(volume.hu)
    for start in range(0, len(hu), _BATCH):
        batch = volume.hu[start : start + _BATCH]
        counts = config.photons * torch.exp(-_line_integrals(batch, scan, config, device))
        # Where hardly a photon arrives, scanners floor the counts before the logarithm, which bounds its error.
        std = variance(counts).clamp(max=1).sqrt()
        sinogram = std * _white((seed,), range(start, start + len(batch)), scan, device)
        noisy = np.rint(batch + _hu_noise(sinogram, scan, config)).clip(AIR_HU, np.iinfo(np.int16).max)
        hu[start : start + _BATCH] = np.where(batch == AIR_HU, AIR_HU, noisy)
    return replace(volume, hu=hu)


def _line_integrals(
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


def _white(
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


def _hu_noise(sinogram: torch.Tensor, scan: Scan, config: DoseConfig) -> np.ndarray:
    """Noise in line integrals, (slices, views, columns) -> noise in HU, (slices, y, x) float32."""
    mu = filtered_backprojection(sinogram, scan, config.cutoff_per_mm)
    return (mu * (1000 / config.water_per_mm)).cpu().numpy()


def _matching_cutoff(
    correlation: float,
    sinogram: torch.Tensor,
    where: np.ndarray,
    scan: Scan,
    spacing: tuple[float, float, float],
) -> float:
    """The Hann cutoff, cycles/mm, at which the noise of in-plane neighbours correlates like this; the ladder's
    nearest end where none does.

    Judged on the slice of `sinogram` with the most windows in `where`.
    """
    best = int(where.sum((1, 2)).argmax())
    nyquist = 1 / (2 * max(scan.spacing))
    cutoffs = [factor * nyquist for factor in _CUTOFFS]
    filtered = torch.cat([ramp_filter(sinogram[best, None], scan, cutoff) for cutoff in cutoffs])
    tried = backproject(filtered, scan).cpu().numpy()
    reached = [
        noise.neighbour_correlation(noise.local_moments(t[None], spacing), where[best, None]) for t in tried
    ]
    return float(np.interp(-correlation, -np.array(reached), cutoffs))
