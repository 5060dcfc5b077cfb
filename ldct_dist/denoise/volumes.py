"""DICOM series in, derived DICOM series out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

import ldct_dist
from ldct_dist.ct.derived import write_derived
from ldct_dist.ct.dicom import find_series, read_series
from ldct_dist.denoise.tiles import denoise_volume
from ldct_dist.errors import UserError
from ldct_dist.models.weights import load_weights, weights_hash


def denoise_series(
    weights: Path,
    source: Path,
    out: Path,
    *,
    device: torch.device | str | None = None,
    bf16: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Path]:
    """Denoise each CT series below `source` into `out`, one folder a series if there are several.

    A voxel that the network leaves unchanged keeps its stored value bit for bit. Returns the files.
    Raises UserError for weights or series that cannot be used; what is then in `out` is whole series.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = load_weights(weights, device)
    series, refused = find_series(source)
    if not series:
        raise refused[0] if refused else UserError(f"{source}: no CT series below it")
    if refused:
        raise UserError(f"{refused[0]} (nothing was written; take it out of {source} to denoise the others)")
    by = f"Denoised by ldct_dist {ldct_dist.__version__}: {model.config.name}-{model.config.size}, weights sha256 {weights_hash(weights)}"
    files = []
    for i, one in enumerate(series):
        target = out if len(series) == 1 else out / f"series-{i + 1:03d}"
        hu = denoise_volume(model, read_series(one).hu, device=device, bf16=bf16, progress=progress)
        files += write_derived(one, hu, target, by)
    return files
