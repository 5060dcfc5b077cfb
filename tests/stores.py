"""Small stores made from arrays, for tests that are not about DICOM."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ldct_dist.ct.volume import Volume
from ldct_dist.store import layout
from ldct_dist.store.reader import Store

SPACING = (5.0, 0.7, 0.7)


def smooth_volume(shape: Sequence[int], seed: int) -> np.ndarray:
    """HU of a blob of tissue in air, with structure that a denoiser can find."""
    z, y, x = (np.linspace(-1, 1, n) for n in shape)
    radius = np.sqrt(z[:, None, None] ** 2 / 4 + y[None, :, None] ** 2 + x[None, None, :] ** 2)
    phase = 2 * np.pi * np.random.default_rng(seed).random(2)
    texture = 60 * np.sin(5 * x + phase[0])[None, None, :] * np.cos(4 * y + phase[1])[None, :, None]
    return np.where(radius < 0.9, 40 + texture, -1000).astype(np.int16)


def make_store(
    path: Path,
    shapes: Sequence[Sequence[int]],
    splits: Sequence[str] | None = None,
    noise: float = 30.0,
) -> Store:
    """A store with one case a shape, `case-000` on; low dose is full dose plus white noise."""
    layout.create(path)
    for i, shape in enumerate(shapes):
        full = smooth_volume(shape, seed=i)
        low = full + np.random.default_rng(1000 + i).normal(0, noise, shape).round().astype(np.int16)
        layout.write_case(
            path,
            f"case-{i:03d}",
            {1.0: Volume(full, SPACING), 0.25: Volume(low.astype(np.int16), SPACING)},
            patient=f"patient-{i:03d}",
            split=splits[i] if splits else "train",
        )
    layout.finalise(path)
    return Store(path)
