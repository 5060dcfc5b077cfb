"""The volumes that all contestants read: four CT series, repeated, with noise added as their low dose."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ldct_dist.ct.dicom import find_series, read_series
from ldct_dist.ct.volume import AIR_HU, Volume
from ldct_dist.errors import UserError
from ldct_dist.store import layout
from ldct_dist.store.reader import Store

CASES, SLICES, NOISE_HU = 24, 128, 20.0
REAL = Path(__file__).parents[3] / "shared" / "data"
LOUD = ("L", "B70f")  # sharp kernels: too noisy to stand for full dose


def prepare(cache: Path) -> None:
    """Write cache/store and, as plain arrays, cache/arrays; nothing if they are there already."""
    if is_store(cache / "store"):
        return
    shutil.rmtree(cache / "store", ignore_errors=True)
    (cache / "arrays").mkdir(parents=True, exist_ok=True)
    layout.create(cache / "store")
    pairs = []
    for i, full in enumerate(_quiet_series()):
        full = np.pad(full, ((0, max(0, SLICES - len(full))), (0, 0), (0, 0)), mode="symmetric")
        noise = np.random.default_rng(i).normal(0, NOISE_HU, full.shape).astype(np.float32)
        low = np.rint(full + noise).clip(AIR_HU, 3000).astype(np.int16)
        np.save(cache / "arrays" / f"{i}-full.npy", full)
        np.save(cache / "arrays" / f"{i}-low.npy", low)
        pairs.append((low, full))
    for i in range(CASES):
        low, full = (Volume(hu, (1.0, 1.0, 1.0)) for hu in pairs[i % len(pairs)])
        name = f"case-{i:02d}"
        layout.write_case(cache / "store", name, {1.0: full, 0.25: low}, patient=name, split="train")
    layout.finalise(cache / "store")


def is_store(path: Path) -> bool:
    """Whether a store is there whole; one that was left unfinished, or is of an older kind, is not."""
    try:
        Store(path)
    except UserError:
        return False
    return True


def arrays(cache: Path) -> list[dict[str, str]]:
    """For each case the files of its plain arrays."""
    kinds = sorted({p.name.split("-")[0] for p in (cache / "arrays").glob("*.npy")})
    files = [{k: str(cache / "arrays" / f"{n}-{k}.npy") for k in ("low", "full")} for n in kinds]
    return [{**files[i % len(files)], "case": f"case-{i:02d}"} for i in range(CASES)]


def _quiet_series() -> Iterator[np.ndarray]:
    if not REAL.is_dir():
        yield from (_phantom(seed) for seed in range(4))
        return
    for series in find_series(REAL)[0]:
        volume = read_series(series)
        if volume.acquisition.kernel not in LOUD:
            yield volume.hu


def _phantom(seed: int) -> np.ndarray:
    """An elliptic body with organs and the noise of a quiet scan."""
    g = np.random.default_rng(seed)
    z, y, x = np.ogrid[0:SLICES, -1:1:512j, -1:1:512j]
    hu = np.full((SLICES, 512, 512), AIR_HU, np.float32)
    hu[np.broadcast_to((x / 0.8) ** 2 + (y / 0.6) ** 2 < 1, hu.shape)] = 40
    for _ in range(30):
        cz, cy, cx, r = *(g.random(3) * (SLICES, 0.8, 1.2) - (0, 0.4, 0.6)), g.uniform(0.03, 0.15)
        inside = ((z - cz) / SLICES / r) ** 2 + ((y - cy) / r) ** 2 + ((x - cx) / r) ** 2 < 1
        hu[inside] = g.choice([-800.0, -100.0, 60.0, 150.0, 700.0])
    hu[hu > AIR_HU] += g.normal(0, 10, np.count_nonzero(hu > AIR_HU))
    return np.rint(hu).clip(AIR_HU, 3000).astype(np.int16)
