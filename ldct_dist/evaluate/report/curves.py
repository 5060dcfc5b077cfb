"""Curves as SVG data addresses."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from ldct_dist.evaluate.figures import INK

_COLOURS = ("#8ab4f8", "#f28b82", "#81c995", "#fdd663", "#c58af9", "#78d9ec", "#fcad70", "#ff8bcb")
_PANEL = "#161616"


class Stroke(NamedTuple):
    """How a method's curves are drawn, in words that CSS and matplotlib share."""

    colour: str
    style: str


def strokes(names: Sequence[str]) -> dict[str, Stroke]:
    """One for each name, the same in all pictures, so that the page needs one legend."""
    n = len(_COLOURS)
    return {name: Stroke(_COLOURS[i % n], "dashed" if i >= n else "solid") for i, name in enumerate(names)}


def curves(
    lines: Mapping[str, tuple[np.ndarray, np.ndarray]],
    drawn: Mapping[str, Stroke],
    title: str,
    x: str,
    y: str,
    top: float | None = None,
) -> str:
    """name -> (x values, y values), each as `drawn` says, as the address of a picture."""
    # Text stays text, and the same study gives the same bytes.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "curves", "font.family": "sans-serif"}):
        figure = Figure((5.2, 3.6), facecolor=_PANEL)
        axes = figure.add_axes((0.13, 0.14, 0.84, 0.76), facecolor=_PANEL)
        for name, (at, values) in lines.items():
            axes.plot(at, values, color=drawn[name].colour, linestyle=drawn[name].style, linewidth=1.6)
        axes.set_title(title, color=INK, fontsize=11, loc="left")
        axes.set_xlabel(x, color=INK)
        axes.set_ylabel(y, color=INK)
        axes.set_xlim(left=0)
        axes.set_ylim(0, top)
        axes.tick_params(colors=INK)
        axes.grid(color="#333333", linewidth=0.6)
        for spine in axes.spines.values():
            spine.set_color("#444444")
        written = io.BytesIO()
        figure.savefig(written, format="svg", facecolor=_PANEL, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(written.getvalue()).decode()
