"""The settings of the simulation of low dose, apart from the simulation itself, which takes seconds to import."""

from __future__ import annotations

import hashlib
from typing import Literal

from pydantic import Field

from ldct_dist.config import Config

Beam = Literal["fan", "parallel"]


class DoseConfig(Config):
    """The scanner that the simulation assumes.

    beam: "fan" over 360 degrees on an equiangular detector, or "parallel" over 180 degrees.
    views, columns: projections, and detector columns over the slice's diagonal. None: two for each voxel of the
        longer side, near what scanners of a 512 matrix have. Fewer carry the same dose with more photons each.
    source_mm: source to isocentre, mm. None: what the volume's tags say, or 595.
    bowtie_mm: radius of the water cylinder around the isocentre that the bow-tie filter evens out, so that all rays
        would leave it alike; outside it, as at its rim. None: no filter.
    modulation: the tube current follows attenuation over the angles, as (its largest in the view)^modulation; the
        rotation's mean stays. 0: constant; 0.5: the least noise for the dose (Gies et al., Med Phys 26 (1999)).
    blur_columns: sigma of the light that a detector column shares with its neighbours, in columns: noise is correlated
        along a view (the electronic part with it). 0: none.
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
    source_mm: float | None = Field(None, gt=0)
    bowtie_mm: float | None = Field(None, gt=0)
    modulation: float = Field(0.0, ge=0, le=1)
    blur_columns: float = Field(0.0, ge=0)
    photons: float | None = Field(None, ge=1)
    cutoff_per_mm: float | None = Field(None, gt=0)
    electronic_noise: float = Field(5.0, ge=0)
    water_per_mm: float = Field(0.0192, gt=0)


def seed_of(name: str, seed: int) -> int:
    """The seed with which to simulate a scan. name: its series' UID, or another name of its own.

    Scans simulated with one `seed` must not share their noise, or a network learns it by heart, and figures of several
    patients are not independent. The same scan gets the same noise wherever it is simulated.
    """
    return seed + int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)
