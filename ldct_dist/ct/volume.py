"""A CT volume in Hounsfield units, and nothing about where it came from on disk."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

AIR_HU = -1024
"""HU of padding, which is what lies outside the scanner's field of view, or beyond the volume's border. Scanners cut off
noise in air at this value, too; `padding_of` tells the two apart."""

Direction = tuple[tuple[float, float, float], ...]

_AXIAL = 0.9  # cosine of a slice's normal to the patient's long axis: a head's slices are laid up to 25 degrees oblique
_REACH = 2  # voxels from the middle of a square of padding to its side


@dataclass(frozen=True)
class Acquisition:
    """How the series was made, as far as its tags say; None where they do not. source_mm: from source to isocentre."""

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
    direction: Direction = (
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


def is_axial(direction: Direction) -> bool:
    """Whether slices lie across the patient, in the plane in which the gantry turns. direction: as in Volume."""
    return abs(direction[0][2]) >= _AXIAL


def padding_of(hu: np.ndarray) -> np.ndarray:
    """Which voxels of `hu` (z, y, x) are padding: bool, of the same shape.

    Padding covers areas, while air whose noise is cut off at AIR_HU is there only in specks: with a sharp kernel, a sixth
    of the air, and some of the lung. So padding is what is left of the voxels at AIR_HU by a morphological opening of
    each slice with a square of 5 x 5 voxels. Outside the slice counts as padding, since padding around a circular field
    of view tapers off along the border.
    """
    padding = np.empty(hu.shape, bool)
    for image, target in zip(hu, padding, strict=True):
        scanned = np.pad(image > AIR_HU, _REACH)
        target[:] = _dilated(~_dilated(scanned))[_REACH:-_REACH, _REACH:-_REACH]
    return padding


def _dilated(mask: np.ndarray) -> np.ndarray:
    """`mask` (y, x) dilated by a square that reaches _REACH voxels to each side."""
    for axis in (0, 1):
        wide = mask.copy()
        to, from_ = wide.swapaxes(0, axis), mask.swapaxes(0, axis)
        for shift in range(1, _REACH + 1):
            to[shift:] |= from_[:-shift]
            to[:-shift] |= from_[shift:]
        mask = wide
    return mask
