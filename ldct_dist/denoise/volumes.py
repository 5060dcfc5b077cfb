"""DICOM series in, derived DICOM series out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

import ldct_dist
from ldct_dist.ct.derived import write_derived
from ldct_dist.ct.dicom import read_series, sound_series
from ldct_dist.denoise.tiles import Progress, Triple, denoise_volume
from ldct_dist.errors import UserError
from ldct_dist.models.weights import load_weights, weights_hash


def denoise_series(
    weights: Path,
    source: Path,
    out: Path,
    *,
    tile: Triple | None = None,
    device: torch.device | str | None = None,
    bf16: bool = False,
    progress: Progress = lambda done, total: None,
    notice: Callable[[str], None] = lambda line: None,
) -> list[Path]:
    """Denoise each CT series below `source` into `out`, one folder a series if there are several.

    A voxel that the network leaves unchanged keeps its stored value bit for bit. DerivationDescription names
    this package's version, the network and the hash of its weights. `device`: None takes a GPU if there is one.
    `progress` hears (tiles done, tiles in all) of each series in turn, `notice` what is passed over as no volume.

    Returns the files. Raises UserError for weights or series that cannot be used, and for an `out` that holds
    something already; what is in `out` afterwards is whole series.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):  # said now, not after an hour's work
        raise UserError(f"{out}: exists already; choose another folder or remove it")
    model = load_weights(weights, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    network = f"{model.config.name}-{model.config.size}"
    description = (
        f"Denoised by ldct_dist {ldct_dist.__version__}, {network}, weights sha256 {weights_hash(weights)}"
    )
    files = []
    series = sound_series(source, notice)
    for number, one in enumerate(series, start=1):
        target = out if len(series) == 1 else out / f"series-{number:03d}"
        hu = denoise_volume(model, read_series(one).hu, tile=tile, bf16=bf16, progress=progress)
        files += write_derived(one, hu, target, description, label=f"denoised {network}")
    return files
