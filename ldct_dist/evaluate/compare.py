"""Figures of several images side by side, under one named protocol."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from ldct_dist.evaluate.metrics import LABELS
from ldct_dist.evaluate.protocols import protocol_named

COLUMNS = ("rmse_hu", "psnr_db", "ssim")


@dataclass(frozen=True)
class Comparison:
    """Figures of each image against full dose, `figures[image][key]`, nan where nothing was measured; of: whose, in
    words."""

    of: str
    protocol: str
    figures: dict[str, dict[str, float]]


def print_comparison(comparison: Comparison, console: Console) -> None:
    measure = protocol_named(comparison.protocol)
    images = Column("", overflow="fold")
    table = Table(
        images, *(LABELS[key] for key in COLUMNS), title=f"{comparison.of} against full dose: {measure}"
    )
    for image, figures in comparison.figures.items():
        table.add_row(image, *(_figure(figures[key], 3 if key == "ssim" else 2) for key in COLUMNS))
    console.print(table)


def print_classification(found: dict[str, Any], console: Console) -> None:
    """What `classify` found."""
    title = f"classified: {found['samples']} images of {found['patients']} patients, 95 % bootstrap intervals"
    table = Table("", "AUC", "accuracy", title=title)
    for image, row in found["images"].items():
        table.add_row(image, *(_interval(*row[key]) for key in ("auc", "accuracy")))
    console.print(table)


def _figure(value: float, digits: int) -> str:
    """A dash, as in the report, where nothing was measured; inf is the PSNR of equal images."""
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def _interval(value: float, low: float | None, high: float | None) -> str:
    return f"{value:.3f}" + (f" [{low:.3f}, {high:.3f}]" if low is not None else "")
