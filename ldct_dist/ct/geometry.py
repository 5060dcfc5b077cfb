"""Slices in patient coordinates stacked to a regular grid, or refused in one line.

Coordinates are DICOM's: mm, x to the patient's left, y to the back, z to the head (LPS).
Formulas: DICOM PS3.3 C.7.6.2.1.1 (Image Plane Module).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ldct_dist.errors import UserError

SAME_PLACE_MM = 0.01
"""Slices closer together than this are one slice twice: no scanner increments the table so little."""

UNEVEN = 0.1
"""Largest distance of a slice from the even grid, in slice spacings: positions rounded to 0.1 mm pass."""

DRIFT = 0.25
"""Largest sideways shift within a stack, in pixels: a tilted gantry's stack shifts by many."""

LENGTHS_MM = (0.01, 100.0)
"""Spacings outside this range are impossible in CT of a patient: the header is wrong."""

FARTHEST_MM = 1e5
"""No table moves further from the origin of patient coordinates; beyond, floats also lose the spacing."""

Vector = tuple[float, float, float]


@dataclass(frozen=True)
class Grid:
    """A regular stack. order[i] is the index, in the order given, of the i-th slice from the feet up.

    positions: distance of each slice along the stacking axis from the coordinate origin, mm, ascending.
    spacing, origin and direction: as in `ldct_dist.ct.volume.Volume`.
    """

    order: tuple[int, ...]
    positions: tuple[float, ...]
    spacing: Vector
    origin: Vector
    direction: tuple[Vector, Vector, Vector]


def stack(
    positions: Sequence[Sequence[float]],
    orientation: Sequence[float],
    pixel_spacing: Sequence[float],
    names: Sequence[str],
) -> Grid:
    """The grid of at least two slices at `positions` (n, 3) that share orientation and pixel spacing.

    The stacking axis is the slice normal, turned so that its largest component is positive: axial slices
    are counted towards the head, whatever way the patient lay and the files are sorted. `names` says what
    each slice is called in a UserError: raised for duplicate, missing, unevenly spaced or sheared slices
    and for values that span no plane.
    """
    x_axis, y_axis, normal = _axes(orientation)
    if not all(LENGTHS_MM[0] <= s <= LENGTHS_MM[1] for s in pixel_spacing):
        raise UserError(
            f"PixelSpacing {tuple(pixel_spacing)} mm is impossible in CT; correct it at the source"
        )
    points = np.asarray(positions, float)
    if np.abs(points).max() > FARTHEST_MM:
        farthest = names[int(np.abs(points).max(axis=1).argmax())]
        raise UserError(f"ImagePositionPatient of {farthest} is over 100 m away; correct it at the source")
    along = points @ normal
    order = np.argsort(along, kind="stable")
    points, along = points[order], along[order]
    _refuse_uneven(along, [names[i] for i in order])
    _refuse_sheared(points, along, normal, min(pixel_spacing))
    dz = (along[-1] - along[0]) / (len(along) - 1)
    if not LENGTHS_MM[0] <= dz <= LENGTHS_MM[1]:
        raise UserError(
            f"slices {dz:g} mm apart are impossible in CT; correct ImagePositionPatient at the source"
        )
    return Grid(
        order=tuple(map(int, order)),
        positions=tuple(map(float, along)),
        spacing=(float(dz), float(pixel_spacing[0]), float(pixel_spacing[1])),
        origin=_vector(points[0]),
        direction=(_vector(normal), _vector(y_axis), _vector(x_axis)),
    )


def _axes(orientation: Sequence[float]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    # Clipped, so that an absurd header does not overflow before it is refused.
    x_axis, y_axis = np.clip(np.reshape(orientation, (2, 3)), -9, 9)
    lengths = np.array([np.linalg.norm(x_axis), np.linalg.norm(y_axis)])
    # Anonymisers round the cosines to three or four decimals; more than that is not a pair of axes.
    if np.abs(lengths - 1).max() > 0.01 or abs(x_axis @ y_axis) > 0.01:
        raise UserError(
            f"ImageOrientationPatient {tuple(orientation)} is not two perpendicular unit vectors; "
            "correct it at the source"
        )
    x_axis = x_axis / lengths[0]
    y_axis = y_axis - (x_axis @ y_axis) * x_axis
    y_axis = y_axis / np.linalg.norm(y_axis)
    normal = np.cross(x_axis, y_axis)
    return x_axis, y_axis, normal * np.sign(normal[np.argmax(np.abs(normal))])


def _refuse_uneven(along: np.ndarray, names: Sequence[str]) -> None:
    gaps = np.diff(along)
    typical = np.median(gaps)

    def where(i: int) -> str:
        return f"{names[i]} ({along[i]:.2f} mm) and {names[i + 1]} ({along[i + 1]:.2f} mm)"

    if gaps.min() < SAME_PLACE_MM:
        raise UserError(
            f"{np.count_nonzero(gaps < SAME_PLACE_MM)} duplicate slice(s), first {where(int(gaps.argmin()))}; "
            "keep one copy or one phase of each"
        )
    steps = np.rint(gaps / typical)
    if steps.max() > 1 and np.abs(gaps - steps * typical).max() <= UNEVEN * typical:
        raise UserError(
            f"{int((steps - 1).sum())} missing slice(s), first between {where(int(steps.argmax()))}; "
            "export the series again, complete"
        )
    even = np.linspace(along[0], along[-1], len(along))
    if np.abs(along - even).max() > UNEVEN * typical:
        raise UserError(
            f"slices unevenly spaced, {gaps.min():.3f} to {gaps.max():.3f} mm, widest between "
            f"{where(int(gaps.argmax()))}; export one evenly spaced reconstruction"
        )


def _refuse_sheared(points: np.ndarray, along: np.ndarray, normal: np.ndarray, pixel: float) -> None:
    sideways = points - points[0] - np.outer(along - along[0], normal)
    drift = np.linalg.norm(sideways, axis=1).max()
    if drift > DRIFT * pixel:
        raise UserError(
            f"slices shift sideways by {drift:.2f} mm through the stack (gantry tilt?); "
            "give a reconstruction without tilt"
        )


def _vector(v: np.ndarray) -> Vector:
    return float(v[0]), float(v[1]), float(v[2])
