"""Low dose against denoised over held-out cases, under one named protocol."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from ldct_dist.denoise.tiles import denoise_volume
from ldct_dist.evaluate.metrics import evaluate_volume
from ldct_dist.evaluate.protocols import protocol_named
from ldct_dist.models.weights import load_weights
from ldct_dist.store.layout import FULL_DOSE, dose_name
from ldct_dist.store.reader import Store

COLUMNS = {"rmse_hu": "RMSE, HU", "psnr_db": "PSNR, dB", "ssim": "SSIM"}


@dataclass(frozen=True)
class Comparison:
    """Figures of each image against full dose: `figures[image][key]`, the mean over cases.

    `cases` holds the same by case, where there are several.
    """

    protocol: str
    figures: dict[str, dict[str, float]]
    cases: dict[str, dict[str, dict[str, float]]] | None = None

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")


def compare(weights: Path, store: Path, *, split: str, dose: float, protocol_name: str) -> Comparison:
    """Denoise and measure each case of `split`. Raises UserError for what is not there."""
    measure, opened = protocol_named(protocol_name), Store(store)
    model = load_weights(weights)
    cases: dict[str, dict[str, dict[str, float]]] = {}
    for i in opened.split(split):
        name = opened.cases[int(i)].name
        low = opened.volume(name, dose_name(dose)).hu
        full = opened.volume(name, FULL_DOSE).hu
        shown = {"low dose": low, "denoised": denoise_volume(model, low)}
        cases[name] = {image: evaluate_volume(hu, full, measure) for image, hu in shown.items()}
    images = next(iter(cases.values()))
    mean = {
        image: {key: float(np.mean([c[image][key] for c in cases.values()])) for key in images[image]}
        for image in images
    }
    return Comparison(measure.name, mean, cases)


def print_comparison(comparison: Comparison, console: Console) -> None:
    measure = protocol_named(comparison.protocol)
    table = Table("", *COLUMNS.values(), title=f"against full dose: {measure}")
    for image, figures in comparison.figures.items():
        table.add_row(
            image, *(f"{figures[key]:.3f}" if key == "ssim" else f"{figures[key]:.2f}" for key in COLUMNS)
        )
    console.print(table)
