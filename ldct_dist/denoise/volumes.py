"""DICOM series in, derived DICOM series out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import ldct_dist
from ldct_dist.ct.derived import write_derived
from ldct_dist.ct.dicom import read_series, sound_series
from ldct_dist.denoise.tiles import Progress, Triple, denoise_volume
from ldct_dist.errors import UserError
from ldct_dist.models.registry import Denoiser
from ldct_dist.models.weights import load_weights, weights_hash


@dataclass(frozen=True)
class SeriesDenoiser:
    """A network with its weights, on its device, for any number of series. name: the network, and what tells it apart."""

    model: Denoiser
    name: str
    bf16: bool = False

    @classmethod
    def load(
        cls, weights: Path, device: torch.device | str | None = None, bf16: bool = False
    ) -> SeriesDenoiser:
        """`device`: None takes a GPU if there is one. Raises UserError for weights that cannot be used."""
        model = load_weights(weights, device or ("cuda" if torch.cuda.is_available() else "cpu"))
        name = f"{model.config.name}-{model.config.size}, weights sha256 {weights_hash(weights)}"
        return cls(model, f"{name}, in bf16" if bf16 else name, bf16)

    def __call__(
        self,
        source: Path,
        out: Path,
        tile: Triple | None = None,
        progress: Progress = lambda done, total: None,
        notice: Callable[[str], None] = lambda line: None,
    ) -> list[Path]:
        """`denoise_series`, into a folder that holds nothing yet."""
        description = f"Denoised by ldct_dist {ldct_dist.__version__}, {self.name}"
        label = f"denoised {self.model.config.name}-{self.model.config.size}"
        files = []
        series = sound_series(source, notice)
        for number, one in enumerate(series, start=1):
            target = out if len(series) == 1 else out / f"series-{number:03d}"
            hu = denoise_volume(self.model, read_series(one).hu, tile=tile, bf16=self.bf16, progress=progress)
            files += write_derived(one, hu, target, description, label=label)
        return files


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
    return SeriesDenoiser.load(weights, device, bf16)(source, out, tile, progress, notice)
