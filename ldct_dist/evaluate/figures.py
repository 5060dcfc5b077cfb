"""Pictures of whole volumes in three planes: as a PNG for people, and as an array for TensorBoard.

Both show the same panels. There is a column for each image, the last being the reference, and one with the difference of
the last two: for low dose, denoised and full dose that is denoised - full dose. The rows are the axial, coronal and
sagittal plane through the middle of the body, head up, all to the same scale in mm.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from scipy.ndimage import zoom

from ldct_dist.ct.volume import Volume
from ldct_dist.evaluate.protocols import Range
from ldct_dist.store.layout import BODY_HU

GREY = colormaps["gray"]
SIGNED = LinearSegmentedColormap.from_list(  # below zero blue, above zero red, no difference dark
    "signed", ["#a8dcff", "#2f7fc1", "#0c0c0c", "#c2472f", "#ffc9b0"]
)
INK, PAPER = "#e6e6e6", "#0c0c0c"

# Inches on paper.
_PANEL, _GAP = 2.8, 0.06
_LEFT, _RIGHT, _TOP, _BOTTOM = 0.34, 0.12, 0.86, 0.66

_STRIP_PIXELS = 256  # width of a column of the array


def minus(words: str) -> str:
    """The text with real minus signs before numbers; hyphens within words, such as abdomen-3d, stay."""
    return re.sub(r"(?<!\w)-(?=\d)", "−", words)


@dataclass(frozen=True)
class _Panel:
    """One column: its three planes, (rows, columns) in HU, and how HU are shown in colours."""

    name: str
    planes: list[np.ndarray]
    colours: Colormap
    norm: Normalize


def three_planes(path: Path, images: dict[str, Volume], window: Range, title: str) -> None:
    """Write the panels of `images` as a PNG to `path`.

    images: a column's title -> its Volume; two or more, of one grid. window: the HU shown as black and as white. The
    difference has its own scale, symmetrical in HU, which reaches to the 99.5th percentile of what the panels show.
    """
    panels, sizes_mm = _panels(images, window)
    mm_per_inch = max(width for _, width in sizes_mm) / _PANEL
    sizes = [(height / mm_per_inch, width / mm_per_inch) for height, width in sizes_mm]
    sheet = _Sheet(
        width=_LEFT + len(panels) * (_PANEL + _GAP) + _RIGHT,
        height=_TOP + sum(height + _GAP for height, _ in sizes) + _BOTTOM,
    )
    sheet.text(_LEFT, 0.30, title, size=13, weight="bold", ha="left")
    for column, panel in enumerate(panels):
        x, y = _LEFT + column * (_PANEL + _GAP), _TOP
        sheet.text(x + _PANEL / 2, _TOP - 0.14, panel.name, size=11)
        for plane, (height, width) in zip(panel.planes, sizes, strict=True):
            axes = sheet.axes(x + (_PANEL - width) / 2, y, width, height)
            axes.imshow(plane, cmap=panel.colours, norm=panel.norm, aspect="auto", interpolation="bilinear")
            y += height + _GAP

    y = _TOP
    for name, (height, _) in zip(("axial", "coronal", "sagittal"), sizes, strict=True):
        sheet.text(_LEFT / 2, y + height / 2, name, size=10, rotation=90)
        y += height + _GAP
    window_middle = _LEFT + len(images) * (_PANEL + _GAP) / 2
    sheet.colour_bar(window_middle, y + 0.1, panels[0], minus(f"window [{window[0]:g}, {window[1]:g}] HU"))
    sheet.colour_bar(sheet.width - _RIGHT - _PANEL / 2, y + 0.1, panels[-1], "difference in HU")
    sheet.figure.savefig(path, facecolor=PAPER)


def planes_strip(images: dict[str, Volume], window: Range) -> np.ndarray:
    """The same panels without words: (3, rows, columns) uint8 RGB, as TensorBoard's add_image takes them.

    Each column is at most 256 pixels wide, and its voxels are square.
    """
    panels, sizes_mm = _panels(images, window)
    widest = max(width for _, width in sizes_mm)
    mm_per_pixel = max(widest / _STRIP_PIXELS, min(images[panels[0].name].spacing))
    columns = []
    for panel in panels:
        tiles = []
        for plane, size in zip(panel.planes, sizes_mm, strict=True):
            # Whole pixels, rounded as the column's width is: zoom would round a half, as floats have it, either way.
            pixels = (max(1, round(mm / mm_per_pixel)) for mm in size)
            scale = [n / voxels for n, voxels in zip(pixels, plane.shape, strict=True)]
            rgb = panel.colours(panel.norm(zoom(plane, scale, order=1, grid_mode=True, mode="nearest")))[
                ..., :3
            ]
            free = round(widest / mm_per_pixel) - rgb.shape[1]
            tiles.append(np.pad(rgb, ((0, 2), (free // 2, free - free // 2 + 2), (0, 0))))
        columns.append(np.concatenate(tiles))
    strip = np.concatenate(columns, axis=1)[:-2, :-2]
    return np.ascontiguousarray((strip * 255).round().astype(np.uint8).transpose(2, 0, 1))


def _panels(images: dict[str, Volume], window: Range) -> tuple[list[_Panel], list[tuple[float, float]]]:
    """A panel for each image and one for the difference, and the planes' (height, width) in mm."""
    *_, (name, image), (reference_name, reference) = images.items()
    box = body_box(reference.hu)
    grey = Normalize(*window, clip=True)
    panels = [_Panel(title, planes(volume.hu, box), GREY, grey) for title, volume in images.items()]
    difference = [a - b for a, b in zip(planes(image.hu, box), planes(reference.hu, box), strict=True)]
    limit = round_up(float(np.percentile(np.concatenate([np.abs(d).ravel() for d in difference]), 99.5)))
    signed = Normalize(-limit, limit, clip=True)
    panels.append(_Panel(f"{name} − {reference_name}", difference, SIGNED, signed))
    return panels, plane_sizes_mm(box, reference.spacing)


def body_box(hu: np.ndarray) -> tuple[slice, slice, slice]:
    """All slices, and the rows and columns between which the body lies; everything where there is none."""
    body = hu > BODY_HU
    box = [slice(0, len(hu))]
    for axis in (1, 2):
        filled = body.sum(axis=(0, 3 - axis))
        inside = np.flatnonzero(filled > 0.02 * filled.max())
        box.append(slice(int(inside[0]), int(inside[-1]) + 1) if len(inside) else slice(0, hu.shape[axis]))
    return box[0], box[1], box[2]


def planes(hu: np.ndarray, box: tuple[slice, slice, slice]) -> list[np.ndarray]:
    """Axial, coronal and sagittal plane through the middle of the box, float32 HU, head up."""
    hu = hu[box]
    z, y, x = (n // 2 for n in hu.shape)
    return [plane.astype(np.float32) for plane in (hu[z], hu[::-1, y], hu[::-1, :, x])]


def plane_sizes_mm(
    box: tuple[slice, slice, slice], spacing: tuple[float, float, float]
) -> list[tuple[float, float]]:
    """(height, width) in mm of each of the `planes` of a box."""
    z, y, x = ((part.stop - part.start) * mm for part, mm in zip(box, spacing, strict=True))
    return [(y, x), (z, x), (z, y)]


def round_up(hu: float) -> float:
    """To the next of 10, 20, 50, 100, ... HU, so that the colour bar has plain numbers at its ends."""
    if hu <= 10:
        return 10.0
    power = 10.0 ** math.floor(math.log10(hu))
    return next(step * power for step in (1, 2, 3, 4, 5, 6, 8, 10) if step * power >= hu)


class _Sheet:
    """A page measured in inches from its upper left corner."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        # A Figure without pyplot: no global state, no window, and threads may each draw their own.
        self.figure = Figure((width, height), dpi=150, facecolor=PAPER)

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        """Bare axes, their upper left corner at (x, y)."""
        bottom = self.height - y - height
        axes = self.figure.add_axes(
            (x / self.width, bottom / self.height, width / self.width, height / self.height)
        )
        axes.set_axis_off()
        return axes

    def text(self, x: float, y: float, words: str, **style: Any) -> None:
        placed = {"color": INK, "ha": "center", "va": "center", **style}
        self.figure.text(x / self.width, 1 - y / self.height, words, placed)

    def colour_bar(self, middle: float, y: float, panel: _Panel, label: str) -> None:
        axes = self.axes(middle - 1.0, y, 2.0, 0.09)
        axes.set_axis_on()
        bar = self.figure.colorbar(
            ScalarMappable(panel.norm, panel.colours), cax=axes, orientation="horizontal"
        )
        low, high = panel.norm.vmin, panel.norm.vmax
        assert low is not None
        assert high is not None
        bar.set_ticks([low, (low + high) / 2, high])
        bar.ax.tick_params(colors=INK, labelsize=8, length=2)
        bar.ax.xaxis.set_major_formatter("{x:g}")
        bar.outline.set_visible(False)
        self.text(middle, y + 0.42, label, size=9)
