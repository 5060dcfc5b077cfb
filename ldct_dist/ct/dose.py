"""Low dose from full dose: the noise that fewer photons would have added, put in where it arises.

Noise is drawn in the projections and reconstructed, so it has the streaks, the texture and the dependence on
the body that a scan at that dose has. Only the missing noise is added, low = full + FBP(noise), so the mean
and the resolution stay those of the scan. For the dose fraction a and counts L = photons exp(-p) at full dose,
the line integral p gets Gaussian noise of variance

    (1 - a) / (a L) + (1 - a^2) electronic_noise^2 / (a^2 L^2)

(Yu et al., J Comput Assist Tomogr 36 (2012); Zeng et al., IEEE Trans Nucl Sci 62 (2015)).

A bow-tie filter, tube current modulation by angle and light shared by neighbouring detector columns are modelled where
the config asks for them. Not modelled: scatter, but for the little that reaches every ray; beam hardening, modulation
along z, noise shared between neighbouring slices of helical scans, and the bias of the logarithm, which takes few
counts for more attenuation than there was (by about half the noise's variance in a line integral); the isocentre is
taken to be the centre of the slice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from ldct_dist.ct import noise
from ldct_dist.ct.projector import Scan, backproject, ramp_filter
from ldct_dist.ct.scanner import DoseConfig, hu_noise, line_integrals, scan_of, shared, transmission, white
from ldct_dist.ct.volume import AIR_HU, Volume, is_axial, padding_of
from ldct_dist.errors import UserError

_BATCH = 16  # slices that share one working-out of the geometry
_MATCHED_SLICES = 8  # on these the noise of a volume is measured
_CUTOFFS = (0.4, 0.55, 0.75, 1.0, 1.4, 2.0, 4.0)  # of the image's Nyquist frequency, tried on the texture
_LEAST_STD_HU = 0.5  # rounding to whole HU alone makes 0.3
_GIVEN = "set photons=2e5 and cutoff_per_mm=0.8, or the scanner's own values (for ingest: simulation.photons and so on)"

_DEFAULTS = DoseConfig()


class UnknownNoiseError(UserError):
    """A scan's noise cannot be measured. reason: without the advice, for verbs that cannot follow it."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"{reason}; {_GIVEN}")
        self.reason = reason


Variance = Callable[[torch.Tensor], torch.Tensor]
"""Detector counts at full dose -> variance of the noise to be put into the line integrals."""


def simulate_low_dose(
    volume: Volume,
    dose: float,
    seed: int,
    config: DoseConfig = _DEFAULTS,
    device: torch.device | str = "cpu",
) -> Volume:
    """`volume` as it would look at the fraction `dose` of its own dose; the same grid, int16 HU.

    The noise of slice i is drawn from (seed, i) alone. So take another seed for another patient, and for a second
    simulation on top of a first: equal seeds draw equal noise. Padding stays, and no other voxel falls below AIR_HU.
    dose=1 gives `volume` itself.

    Raises UserError for a dose outside (0, 1], for slices that are not axial, and where config leaves photons or the
    cutoff to be matched and the volume shows no noise to match.
    """
    return simulate_low_doses(volume, [dose], seed, config, device)[0]


def simulate_low_doses(
    volume: Volume,
    doses: Sequence[float],
    seed: int,
    config: DoseConfig = _DEFAULTS,
    device: torch.device | str = "cpu",
) -> list[Volume]:
    """`simulate_low_dose` at each of `doses`, bit for bit, for one measurement of the noise and one projection.

    The doses share their random numbers: they differ in how much noise there is, not in where it is.
    """
    for dose in doses:
        if not 0 < dose <= 1:
            raise UserError(
                f"dose {dose}: give the fraction of full dose to keep, above 0 and up to 1, such as 0.25"
            )
    if seed < 0:
        raise UserError(f"seed {seed}: give a whole number from 0 up")
    lower = [dose for dose in doses if dose < 1]
    if not lower:
        return [volume] * len(doses)
    if not is_axial(volume.direction):
        raise UserError(
            "simulated dose: its slices are not axial, as the simulated scanner's are; give the axial series"
        )
    config = matched(volume, config, device)
    missing = [_missing(dose, config) for dose in lower]
    simulated = iter(_with_noise(volume.hu, scan_of(volume, config), missing, seed, config, device))
    return [volume if dose == 1 else replace(volume, hu=next(simulated)) for dose in doses]


def _missing(dose: float, config: DoseConfig) -> Variance:
    """The variance that a scan at `dose` has beyond that of one at full dose."""
    return lambda counts: _whole(dose * counts, config) - _whole(counts, config)


def _whole(counts: torch.Tensor, config: DoseConfig) -> torch.Tensor:
    """The whole variance of line integrals. Where hardly a photon arrives, scanners raise the counts to a least value before
    the logarithm, which bounds its error at either dose."""
    return (1 / counts + (config.electronic_noise / counts).square()).clamp(max=1)


def simulate_full_dose(
    hu: np.ndarray,
    spacing: tuple[float, float, float],
    seed: int,
    config: DoseConfig,
    device: torch.device | str = "cpu",
) -> Volume:
    """A noise-free phantom as a scan with `config.photons` would show it: all the noise, 1/L + electronic^2/L^2.

    hu: (z, y, x), not rounded: if they are rounded only after the noise is added, they keep their mean, and a faint lesion
    keeps its rim. A phantom has no noise to match, so without a cutoff_per_mm the kernel is the bare ramp.
    """
    if config.photons is None:
        raise UserError("simulating a full-dose scan of a phantom: set photons, for example 2e5")
    blank = Volume(np.empty(hu.shape, np.int16), spacing)
    (noisy,) = _with_noise(hu, scan_of(blank, config), [partial(_whole, config=config)], seed, config, device)
    return replace(blank, hu=noisy)


def matched(volume: Volume, config: DoseConfig, device: torch.device | str = "cpu") -> DoseConfig:
    """`config` with photons and cutoff_per_mm filled in from the noise in the volume's soft tissue.

    On up to 8 slices. First the cutoff: the same noise is reconstructed with a ladder of cutoffs, and the one
    is interpolated at which neighbours correlate as in the volume. Then the photons: with unit photons the
    quantum and the electronic noise have the variances q and e in the windows measured, so the noise at full dose is
    std^2 = q / photons + e / photons^2. A given photons or cutoff_per_mm is kept. On discs of water whose noise is known,
    the cutoff is 2 to 4 % too high, and the noise that is then added 1 to 2 % too low.

    Raises UserError if the volume has too little soft tissue, or noise below 0.5 HU (a phantom, a denoised series).
    """
    if config.photons is not None and config.cutoff_per_mm is not None:
        return config
    some = np.linspace(0, len(volume.hu) - 1, min(_MATCHED_SLICES, len(volume.hu))).round().astype(int)
    hu = volume.hu[some]
    moments = noise.local_moments(hu, volume.spacing, neighbours=True)
    where = moments.homogeneous
    if where is None:
        raise UnknownNoiseError("simulated dose: too little soft tissue to measure the scan's noise")
    std = noise.noise_std(moments, where)
    if std < _LEAST_STD_HU:
        raise UnknownNoiseError(f"simulated dose: noise of {std:.2f} HU is too little to scale")

    # A quarter of the views, each with four times the photons, makes the same noise as far as a window reaches.
    whole = scan_of(volume, config)
    scan = whole.coarse(4, 1)
    arriving = transmission(line_integrals(hu, scan, config, device), scan, config)
    quantum = white((0, 0), some, scan, device) / arriving.sqrt()
    if config.cutoff_per_mm is None:
        correlation = noise.neighbour_correlation(moments, where)
        cutoff = _matching_cutoff(correlation, quantum, where, scan, volume.spacing, config.blur_columns)
        config = config.model_copy(update={"cutoff_per_mm": cutoff})
    if config.photons is None:
        electronic = config.electronic_noise * white((0, 1), some, scan, device) / arriving
        both = hu_noise(torch.cat([quantum, electronic]), scan, config)
        q, e = (
            noise.noise_std(noise.local_moments(hu, volume.spacing), where) ** 2 for hu in np.split(both, 2)
        )
        q, e = (variance * scan.views / whole.views for variance in (q, e))
        photons = (q + (q * q + 4 * std * std * e) ** 0.5) / (2 * std * std)
        config = config.model_copy(update={"photons": photons})
    return config


def _with_noise(
    clean: np.ndarray,
    scan: Scan,
    variances: Sequence[Variance],
    seed: int,
    config: DoseConfig,
    device: torch.device | str,
) -> list[np.ndarray]:
    """For each of `variances`, `clean` HU (z, y, x) plus noise whose line integrals have that variance; int16."""
    assert config.photons is not None
    noisy = [np.empty(clean.shape, np.int16) for _ in variances]
    for start in range(0, len(clean), _BATCH):
        batch = clean[start : start + _BATCH]
        counts = config.photons * transmission(line_integrals(batch, scan, config, device), scan, config)
        drawn = white((seed,), range(start, start + len(batch)), scan, device)
        padding = padding_of(batch)
        for hu, variance in zip(noisy, variances, strict=True):
            added = batch + hu_noise(variance(counts).sqrt() * drawn, scan, config)
            hu[start : start + _BATCH] = np.where(
                padding, AIR_HU, np.rint(added).clip(AIR_HU, np.iinfo(np.int16).max)
            )
    return noisy


def _matching_cutoff(
    correlation: float,
    sinogram: torch.Tensor,
    where: np.ndarray,
    scan: Scan,
    spacing: tuple[float, float, float],
    blur_columns: float,
) -> float:
    """The Hann cutoff, cycles/mm, at which the noise of in-plane neighbours correlates like this; the ladder's
    nearest end where none does.

    Judged on the slice of `sinogram` with the most windows in `where`.
    """
    best = int(where.sum((1, 2)).argmax())
    nyquist = 1 / (2 * max(scan.spacing))
    cutoffs = [factor * nyquist for factor in _CUTOFFS]
    spread = shared(sinogram[best, None], blur_columns)
    filtered = torch.cat([ramp_filter(spread, scan, cutoff) for cutoff in cutoffs])
    tried = backproject(filtered, scan).cpu().numpy()
    reached = [
        noise.neighbour_correlation(noise.local_moments(t[None], spacing, neighbours=True), where[best, None])
        for t in tried
    ]
    return float(np.interp(-correlation, -np.array(reached), cutoffs))
