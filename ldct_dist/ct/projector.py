"""Forward projection and filtered backprojection of axial slices, vectorised over slices and views.

Both directions are weighted sums of table rows: a ray sums image voxels, a voxel sums detector readings,
and a row of the table holds all slices of the batch. So the geometry is worked out once a batch, and
`embedding_bag` does the summing without ever storing the products, on CPU and CUDA alike.

Lengths are mm, angles radians, attenuation 1/mm. The isocentre is the centre of the slice. A ray (theta, t)
is the line x cos(theta) + y sin(theta) = t; the fan ray at fan angle gamma of the view at beta is the
parallel ray (beta + gamma, source_mm sin(gamma)). Formulas: Kak & Slaney, Principles of Computerized
Tomographic Imaging (1988), 3.3 (parallel) and 3.4.1 (equiangular fan).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from ldct_dist.ct.dose_config import Beam

_ENTRIES = 1 << 22  # (row, weight) pairs made at a time: 32 MiB, and more is no faster


@dataclass(frozen=True)
class Scan:
    """A circular scan of one slice: a fan over 360 degrees on an equiangular detector, or parallel over 180.

    shape: voxels (y, x). spacing: mm (y, x). source_mm: source to isocentre; only the fan uses it.
    The rays cover the circle of `radius_mm` around the isocentre; nothing outside it is reconstructed.
    """

    beam: Beam
    views: int
    columns: int
    source_mm: float
    shape: tuple[int, int]
    spacing: tuple[float, float]

    @property
    def radius_mm(self) -> float:
        """The slice's corners, or 95 % of the way to the source where a corner lies beyond that."""
        corner = math.hypot(self.shape[0] * self.spacing[0], self.shape[1] * self.spacing[1]) / 2
        return corner if self.beam == "parallel" else min(corner, 0.95 * self.source_mm)

    @property
    def pitch(self) -> float:
        """Between neighbouring rays of a view: mm for the parallel beam, radians for the fan."""
        half = self.radius_mm if self.beam == "parallel" else math.asin(self.radius_mm / self.source_mm)
        return 2 * half / self.columns

    @property
    def pitch_mm(self) -> float:
        """Between neighbouring rays where they pass the isocentre, mm."""
        return self.pitch if self.beam == "parallel" else self.pitch * self.source_mm

    def angles(self) -> torch.Tensor:
        """(views,) float64: the view angles, each in the middle of its arc."""
        arc = math.pi if self.beam == "parallel" else 2 * math.pi
        return (torch.arange(self.views, dtype=torch.float64) + 0.5) * (arc / self.views)

    def offsets(self) -> torch.Tensor:
        """(columns,) float64: each ray's t in mm (parallel) or fan angle gamma (fan)."""
        return (torch.arange(self.columns, dtype=torch.float64) - (self.columns - 1) / 2) * self.pitch

    def rays(self) -> tuple[torch.Tensor, torch.Tensor]:
        """theta and t in mm of every ray, both (views, columns) float64."""
        angles, offsets = self.angles()[:, None], self.offsets()
        if self.beam == "parallel":
            return angles.expand(-1, self.columns), offsets.expand(self.views, -1)
        return angles + offsets, (self.source_mm * torch.sin(offsets)).expand(self.views, -1)

    def coarse(self, views: int, columns: int) -> Scan:
        """The same arc and field of view seen by about `views` times fewer views and `columns` times fewer rays."""
        return replace(self, views=max(1, self.views // views), columns=max(1, self.columns // columns))


def forward(mu: torch.Tensor, scan: Scan, step_mm: float) -> torch.Tensor:
    """Line integrals of `mu` along every ray: (slices, y, x) in 1/mm -> (slices, views, columns).

    Bilinear samples `step_mm` apart; half a voxel resolves everything the grid holds.
    """
    table = _table(functional.pad(mu.float(), (1, 1, 1, 1)))  # a frame of zeros around each slice
    steps = math.ceil(2 * scan.radius_mm / step_mm)
    along = (torch.arange(steps, device=mu.device) - (steps - 1) / 2) * step_mm
    theta, t = (ray.flatten().float().to(mu.device)[:, None] for ray in scan.rays())
    (rows, columns), (dy, dx) = scan.shape, scan.spacing
    sums = []
    for part in _parts(len(theta), 4 * steps):
        cos, sin = torch.cos(theta[part]), torch.sin(theta[part])
        # Positions count from the frame's corner; clamping sends what lies outside to the frame.
        x = ((t[part] * cos - along * sin) / dx + (columns + 1) / 2).clamp_(0, columns + 1)
        y = ((t[part] * sin + along * cos) / dy + (rows + 1) / 2).clamp_(0, rows + 1)
        left, top = x.floor().clamp_(max=columns), y.floor().clamp_(max=rows)
        x, y = x.sub_(left), y.sub_(top)
        corner = top.int() * (columns + 2) + left.int()
        index = torch.cat([corner, corner + 1, corner + (columns + 2), corner + (columns + 3)], 1)
        weight = torch.cat([(1 - y) * (1 - x), (1 - y) * x, y * (1 - x), y * x], 1)
        sums.append(_weighted_sums(table, index, weight))
    integrals = torch.cat(sums).T * step_mm
    return integrals.reshape(-1, scan.views, scan.columns)


def filtered_backprojection(sinogram: torch.Tensor, scan: Scan, cutoff: float | None = None) -> torch.Tensor:
    """(slices, views, columns) line integrals -> (slices, y, x) in 1/mm; `cutoff` as in ramp_filter."""
    return backproject(ramp_filter(sinogram, scan, cutoff), scan)


def ramp_filter(sinogram: torch.Tensor, scan: Scan, cutoff: float | None = None) -> torch.Tensor:
    """Filter every view, (slices, views, columns) -> the same shape, ready for `backproject`.

    cutoff: where the Hann window reaches zero, in cycles/mm at the isocentre; None: the bare ramp. A cutoff
    beyond the detector's Nyquist frequency leaves part of the window's tail away.
    """
    n = torch.arange(scan.columns, dtype=torch.float64)
    kernel = torch.where(n % 2 == 1, -1 / (math.pi * n * scan.pitch).square(), 0.0)
    kernel[0] = 1 / (4 * scan.pitch**2)
    weight = torch.ones(scan.columns, dtype=torch.float64)
    if scan.beam == "fan":
        gamma = n * scan.pitch
        # Half of it, because over 360 degrees every ray is measured twice.
        kernel *= 0.5 / torch.sinc(gamma / math.pi).square()
        weight = scan.source_mm * torch.cos(scan.offsets())

    length = 1 << (2 * scan.columns - 1).bit_length()  # long enough that the convolution does not wrap
    padded = torch.zeros(length, dtype=torch.float64)
    padded[: scan.columns] = kernel
    padded[-scan.columns + 1 :] = kernel[1:].flip(0)
    response = torch.fft.rfft(padded).real * scan.pitch
    if cutoff is not None:
        frequency = torch.fft.rfftfreq(length, scan.pitch_mm, dtype=torch.float64)
        response *= 0.5 + 0.5 * torch.cos(math.pi * (frequency / cutoff).clamp(max=1))

    weight, response = weight.float().to(sinogram.device), response.float().to(sinogram.device)
    filtered = torch.empty_like(sinogram)
    for part in _parts(scan.views, length * len(sinogram)):
        spectrum = torch.fft.rfft(sinogram[:, part] * weight, length)
        filtered[:, part] = torch.fft.irfft(spectrum * response, length)[..., : scan.columns]
    return filtered


def backproject(filtered: torch.Tensor, scan: Scan) -> torch.Tensor:
    """Filtered views (slices, views, columns) -> slices (slices, y, x) in 1/mm, zero outside `radius_mm`.

    Linear interpolation between columns.
    """
    device = filtered.device
    table = _table(functional.pad(filtered, (1, 1)))  # a column of zeros at both ends of each view
    first = torch.arange(scan.views, device=device, dtype=torch.int32) * (scan.columns + 2)
    voxels = _voxel_positions(scan).to(device)
    inside = torch.linalg.vector_norm(voxels, dim=1) <= scan.radius_mm
    positions = voxels[inside]
    angles = scan.angles()
    toward = torch.stack([torch.sin(angles), -torch.cos(angles)]).float().to(device)
    across = torch.stack([torch.cos(angles), torch.sin(angles)]).float().to(device)
    arc = (math.pi if scan.beam == "parallel" else 2 * math.pi) / scan.views

    sums = []
    for part in _parts(len(positions), 2 * scan.views):
        # Not a matrix product: NVIDIA's containers round its factors to ten bits, which is a tenth of a millimetre.
        x, y = positions[part].split(1, dim=1)
        offset = x * across[0] + y * across[1]
        scale: torch.Tensor | float = arc
        if scan.beam == "fan":
            depth = x * toward[0] + y * toward[1] + scan.source_mm
            scale = arc / (depth.square() + offset.square())
            offset = torch.atan2(offset, depth)
        column = (offset / scan.pitch + (scan.columns + 1) / 2).clamp_(0, scan.columns + 1)
        left = column.floor().clamp_(max=scan.columns)
        right = column - left
        index = left.int() + first
        weight = torch.cat([(1 - right) * scale, right * scale], 1)
        sums.append(_weighted_sums(table, torch.cat([index, index + 1], 1), weight))
    slices = filtered.new_zeros(len(voxels), len(filtered))
    slices[inside] = torch.cat(sums)
    return slices.T.reshape(-1, *scan.shape)


def _table(slices: torch.Tensor) -> torch.Tensor:
    """(slices, rows, columns) -> (rows * columns, slices), each row side by side in memory.

    A clone, because contiguous() keeps the strides of a single slice, on which embedding_bag takes a slower path that
    rounds differently: a slice alone would not get the noise that it gets among others.
    """
    return slices.flatten(1).T.clone(memory_format=torch.contiguous_format)


def _weighted_sums(table: torch.Tensor, index: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """out[i] = sum over j of weight[i, j] * table[index[i, j]]."""
    return functional.embedding_bag(index, table, per_sample_weights=weight, mode="sum")


def _voxel_positions(scan: Scan) -> torch.Tensor:
    """(y * x, 2) float32: x and y of every voxel centre, mm from the isocentre."""
    y, x = (
        (torch.arange(n, dtype=torch.float64) - (n - 1) / 2) * mm
        for n, mm in zip(scan.shape, scan.spacing, strict=True)
    )
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).reshape(-1, 2).float()


def _parts(count: int, entries_each: int) -> Iterator[slice]:
    """Slices of range(count) that make about _ENTRIES table entries each."""
    size = max(1, _ENTRIES // entries_each)
    return (slice(start, start + size) for start in range(0, count, size))
