"""DICOM series in, derived DICOM series out."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import ldct_dist
from ldct_dist.checkpoint.load import weights_of
from ldct_dist.ct.derived import write_derived
from ldct_dist.ct.dicom import Series, read_series, sound_series
from ldct_dist.denoise.claim import MADE_BY, claim
from ldct_dist.denoise.tiles import Progress, Triple, denoise_volume, refuse_strength
from ldct_dist.errors import memory_for
from ldct_dist.files import refuse_inside, refuse_taken, refuse_unwritable
from ldct_dist.models.registry import Denoiser
from ldct_dist.models.weights import load_weights, weights_hash


@dataclass(frozen=True)
class SeriesDenoiser:
    """A network with its weights on its device, for any number of series. name: says which network, weights and settings,
    and so what made an image."""

    model: Denoiser
    name: str
    bf16: bool = False
    strength: float = 1.0

    @classmethod
    def load(
        cls,
        weights: Path | str,
        device: torch.device | str | None = None,
        bf16: bool = False,
        strength: float = 1.0,
    ) -> SeriesDenoiser:
        """Arguments as of `denoise_series`. Raises UserError for weights, or a strength, that cannot be used."""
        refuse_strength(strength)
        file = weights_of(Path(weights))
        model = load_weights(file, device or ("cuda" if torch.cuda.is_available() else "cpu"))
        name = f"{model.config.label}, weights sha256 {weights_hash(file)}"
        name += ", in bf16" if bf16 else ""
        name += f", at strength {strength:g}" if strength < 1 else ""
        return cls(model, name, bf16, strength)

    def __call__(
        self,
        source: Path | str,
        out: Path | str,
        tile: Triple | None = None,
        progress: Progress = lambda done, total: None,
        notice: Callable[[str], None] = lambda line: None,
    ) -> list[Path]:
        """`denoise_series` with this network."""
        out = Path(out)
        refuse_inside(out, Path(source))
        series = sound_series(source, notice)
        if len(series) == 1:
            refuse_taken(out)
            refuse_unwritable(out.absolute().parent)
            return self._denoise(series[0], out, tile, progress)
        uids = hashlib.sha256(" ".join(one.series_uid for one in series).encode()).hexdigest()[:16]
        claim(out, f"{self.name}, from {len(series)} series (their UIDs' sha256 {uids})")
        files = []
        for number, one in enumerate(series, start=1):
            target = out / f"series-{number:03d}"
            if target.exists():
                notice(f"{target}: there already")
            else:
                self._denoise(one, target, tile, progress)
                notice(f"{target}: denoised, {number} of {len(series)}")
            files += sorted(target.iterdir())
        return files

    def _denoise(self, series: Series, out: Path, tile: Triple | None, progress: Progress) -> list[Path]:
        description = f"Denoised by ldct_dist {ldct_dist.__version__}, {self.name}"
        label = f"denoised {self.model.config.label}"
        with memory_for(series.name):
            hu = denoise_volume(
                self.model,
                read_series(series).hu,
                tile=tile,
                bf16=self.bf16,
                strength=self.strength,
                progress=progress,
            )
            return write_derived(series, hu, out, description, label=label)


def denoise_series(
    weights: Path | str,
    source: Path | str,
    out: Path | str,
    *,
    tile: Triple | None = None,
    device: torch.device | str | None = None,
    bf16: bool = False,
    strength: float = 1.0,
    progress: Progress = lambda done, total: None,
    notice: Callable[[str], None] = lambda line: None,
) -> list[Path]:
    """Denoise each CT series below `source`, or in that file, into `out`, one folder a series if there are several.

    weights: a weights file, a checkpoint, or a run, whose best weights are taken. strength: the share of the network's
    change that is applied, above 0 and up to 1. device: None takes a GPU if there is one. progress: called with (tiles
    done, tiles in all) of each series in turn. notice: is told what is passed over as no volume and, of several series,
    each that is done.

    A voxel that the network leaves unchanged keeps its stored value bit for bit. DerivationDescription names this
    package's version, the network and the hash of its weights. `out` holds complete series only: if a start with several
    is stopped, those that are done stay, and the next start with the same series and weights goes on.

    Returns the files. Raises UserError for weights or series that cannot be used or are too large for memory, and for an
    `out` that cannot be written, is in `source`, or holds something else.
    """
    if not os.path.exists(Path(out) / MADE_BY):  # Path.exists would raise PermissionError
        refuse_taken(Path(out))  # before work that may take an hour
    return SeriesDenoiser.load(weights, device, bf16, strength)(source, out, tile, progress, notice)
