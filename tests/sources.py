"""Folders of synthetic DICOM to ingest, small and quick to simulate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from ldct_dist.ct.dose import DoseConfig
from ldct_dist.store.ingest import IngestConfig
from stores import smooth_volume
from synthetic_dicom import Options, write_series

SHAPE = (6, 36, 40)
QUICK = DoseConfig(views=16, columns=32, photons=1e5, cutoff_per_mm=0.5)
CONFIG = IngestConfig(simulation=QUICK, workers=2)


def anatomy(seed: int = 0, shape: tuple[int, int, int] = SHAPE, noise: float = 5.0) -> np.ndarray:
    """HU of a patient, with the noise of a scan."""
    grain = np.random.default_rng(100 + seed).normal(0, noise, shape)
    return np.rint(smooth_volume(shape, seed) + grain).clip(-1024).astype(np.int16)


def write_patients(folder: Path, count: int, **options) -> Path:
    """`count` patients of one full-dose series each: P000 on."""
    for i in range(count):
        write_series(folder / f"p{i}", anatomy(i), Options(patient=f"P{i:03d}", **options))
    return folder


def write_pair(
    full: Path,
    low: Path,
    options: Options,
    *,
    low_hu: np.ndarray | None = None,
    low_options: Options | None = None,
) -> None:
    """A full-dose series and its low dose, which is noisier unless `low_hu` says what it is."""
    hu = anatomy()
    grain = np.random.default_rng(1).normal(0, 20, hu.shape)
    noisy = np.rint(hu + grain).clip(-1024).astype(np.int16)
    write_series(full, hu, replace(options, seed="full" + str(full)))
    low_options = replace(low_options or options, seed="low" + str(low))
    write_series(low, noisy if low_hu is None else low_hu, low_options)


def content(store: Path) -> dict[str, bytes]:
    """Every file of a store, by its place in it."""
    return {str(p.relative_to(store)): p.read_bytes() for p in sorted(store.rglob("*")) if p.is_file()}
