"""A CT volume in Hounsfield units, and nothing about where it came from on disk."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

AIR_HU = -1024
"""HU of padding: what lies outside the scanner's field of view or beyond the volume's border."""


@dataclass(frozen=True)
class Acquisition:
    """How the series was made, as far as its tags say; None where they are silent. source_mm: source to isocentre."""

    manufacturer: str | None = None
    model: str | None = None
    kernel: str | None = None
    kvp: float | None = None
    exposure_mas: float | None = None
    slice_thickness_mm: float | None = None
    source_mm: float | None = None


@dataclass(frozen=True)
class Volume:
    """int16 HU on a regular grid.

    hu: (z, y, x) int16, z increasing towards the head for axial series; padding is AIR_HU.
    spacing: voxel size in mm, (z, y, x).
    origin: centre of voxel [0, 0, 0] in mm, DICOM patient coordinates (x, y, z), LPS.
    direction: rows are the unit vectors, in patient coordinates, of the array's z, y and x axes.
    """

    hu: np.ndarray
    spacing: tuple[float, float, float]
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0)
    direction: tuple[tuple[float, float, float], ...] = (
        (0.0, 0.0, 1.0),
        (0.0, 1.0, 0.0),
        (1.0, 0.0, 0.0),
    )
    acquisition: Acquisition = field(default_factory=Acquisition)

    def __post_init__(self) -> None:
        assert self.hu.dtype == np.int16, f"HU are int16, not {self.hu.dtype}"
        assert self.hu.ndim == 3, f"a volume is (z, y, x), not {self.hu.shape}"
        assert min(self.spacing) > 0, f"spacing in mm must be positive: {self.spacing}"

    @property
    def shape(self) -> tuple[int, int, int]:
        z, y, x = self.hu.shape
        return z, y, x
