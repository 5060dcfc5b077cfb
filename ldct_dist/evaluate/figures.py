"""Pictures in the radiologist's three planes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ldct_dist.ct.volume import Volume

PLANES = ("axial", "coronal", "sagittal")
DIFFERENCE_HU = 60.0
WIDTH_MM = 62.0  # of one panel on the page


def three_planes(path: Path, images: Mapping[str, Volume], window: tuple[float, float], title: str) -> None:
    """A PNG: a row a plane through the middle, a column an image, and last minus last but one as difference.

    images: in order, the reference last; all on one grid. window: HU (low, high) shown from black to white.
    """
    names = list(images)
    reference, candidate = images[names[-1]], images[names[-2]]
    difference = candidate.hu.astype(np.float32) - reference.hu
    columns = [(name, images[name].hu, "gray", window) for name in names]
    limit = (-DIFFERENCE_HU, DIFFERENCE_HU)
    columns.append((f"{names[-2]} - {names[-1]}", difference, "RdBu_r", limit))

    spacing = reference.spacing
    heights = [n * mm for n, mm in (_extent(reference.hu.shape, spacing, plane)[0] for plane in PLANES)]
    widths = [n * mm for n, mm in (_extent(reference.hu.shape, spacing, plane)[1] for plane in PLANES)]
    scale = WIDTH_MM / max(widths) / 25.4
    figure = Figure(
        figsize=(len(columns) * (max(widths) * scale + 0.12) + 0.9, sum(heights) * scale + 1.15),
        dpi=130,
        facecolor="black",
    )
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        3, len(columns) + 1, height_ratios=heights, width_ratios=[1] * len(columns) + [0.05],
        left=0.03, right=0.95, top=0.88, bottom=0.02, hspace=0.04, wspace=0.04,
    )  # fmt: skip
    for row, plane in enumerate(PLANES):
        for column, (name, hu, colours, (low, high)) in enumerate(columns):
            axes = figure.add_subplot(grid[row, column])
            (_, dy), (_, dx) = _extent(hu.shape, spacing, plane)
            shown = axes.imshow(
                _middle(hu, plane), cmap=colours, vmin=low, vmax=high, aspect=dy / dx, interpolation="nearest"
            )
            axes.set_xticks([])
            axes.set_yticks([])
            for spine in axes.spines.values():
                spine.set_visible(False)
            if row == 0:
                axes.set_title(name, color="white", fontsize=11)
            if column == 0:
                axes.set_ylabel(plane, color="white", fontsize=10)
    bar = figure.colorbar(shown, cax=figure.add_subplot(grid[:, -1]))
    bar.set_label("difference, HU", color="white", fontsize=9)
    bar.ax.tick_params(colors="white", labelsize=8)
    figure.suptitle(f"{title}    window [{window[0]:g}, {window[1]:g}] HU", color="white", fontsize=12)
    figure.savefig(path, facecolor=figure.get_facecolor())


def planes_strip(
    hu: np.ndarray, spacing: tuple[float, float, float], window: tuple[float, float]
) -> np.ndarray:
    """The three middle planes side by side, uint8 (H, W): black to white over the window, pixels square in mm."""
    low, high = window
    pixel = min(spacing)
    pictures = []
    for plane in PLANES:
        (rows, dy), (columns, dx) = _extent(hu.shape, spacing, plane)
        y = (np.arange(round(rows * dy / pixel)) * pixel / dy).astype(int).clip(0, rows - 1)
        x = (np.arange(round(columns * dx / pixel)) * pixel / dx).astype(int).clip(0, columns - 1)
        gray = (_middle(hu, plane).astype(np.float32) - low) / (high - low)
        pictures.append((gray.clip(0, 1) * 255).astype(np.uint8)[np.ix_(y, x)])
    height = max(p.shape[0] for p in pictures)
    return np.hstack([np.pad(p, ((0, height - p.shape[0]), (0, 4))) for p in pictures])


def _middle(hu: np.ndarray, plane: str) -> np.ndarray:
    """The middle slice of a plane, as it is read: head up in coronal and sagittal."""
    z, y, x = (n // 2 for n in hu.shape)
    return {"axial": hu[z], "coronal": hu[::-1, y], "sagittal": hu[::-1, :, x]}[plane]


def _extent(
    shape: tuple[int, ...], spacing: tuple[float, float, float], plane: str
) -> tuple[tuple[int, float], tuple[int, float]]:
    """(pixels, mm a pixel) down and across."""
    z, y, x = zip(shape, spacing, strict=True)
    return {"axial": (y, x), "coronal": (z, x), "sagittal": (z, y)}[plane]
