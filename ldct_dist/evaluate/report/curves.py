"""Curves as SVG data addresses."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from ldct_dist.evaluate.figures import INK

_COLOURS = ("#8ab4f8", "#f28b82", "#81c995", "#fdd663", "#c58af9", "#78d9ec", "#fcad70", "#ff8bcb")
_PANEL = "#161616"


def curves(
    lines: Mapping[str, tuple[np.ndarray, np.ndarray]], title: str, x: str, y: str, top: float | None = None
) -> str:
    """name -> (x values, y values), with a legend, as the address of a picture."""
    # Text stays text, and the same study gives the same bytes.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "curves", "font.family": "sans-serif"}):
        figure = Figure((5.2, 3.6), facecolor=_PANEL)
        axes = figure.add_axes((0.13, 0.14, 0.84, 0.76), facecolor=_PANEL)
        for i, (name, (at, values)) in enumerate(lines.items()):
            style = "--" if i >= len(_COLOURS) else "-"
            axes.plot(at, values, style, color=_COLOURS[i % len(_COLOURS)], label=name, linewidth=1.6)
        axes.set_title(title, color=INK, fontsize=11, loc="left")
        axes.set_xlabel(x, color=INK)
        axes.set_ylabel(y, color=INK)
        axes.set_xlim(left=0)
        axes.set_ylim(0, top)
        axes.tick_params(colors=INK)
        axes.grid(color="#333333", linewidth=0.6)
        for spine in axes.spines.values():
            spine.set_color("#444444")
        axes.legend(fontsize=8.5, facecolor=_PANEL, edgecolor="#444444", labelcolor=INK)
        written = io.BytesIO()
        figure.savefig(written, format="svg", facecolor=_PANEL, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(written.getvalue()).decode()
