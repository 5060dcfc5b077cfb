"""Four patients' quiet series, each left out once: stores that differ in nothing but their splits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from ldct_dist.ct.dicom import one_series, read_series
from ldct_dist.ct.dose import simulate_low_dose
from ldct_dist.ct.volume import AIR_HU, Volume
from ldct_dist.store import layout

DOSE = 0.25
SERIES = {
    "CRLM-CT-1004": "colorectal-liver/CRLM-CT-1004",
    "CRLM-CT-1006": "colorectal-liver/CRLM-CT-1006",
    "A0001": "lung-pet-ct-dx/A0001/series-3",
    "A0002": "lung-pet-ct-dx/A0002/series-3-B40f",
}


def folds(data: Path, work: Path, binning: int) -> dict[str, Path]:
    """Patient -> the store in which it is the test split, the next patient validation, the other two training.

    Pixels are first averaged over squares of `binning` voxels; the low dose is simulated after that. Made once.
    Raises UserError for a series that is not there.
    """
    names = list(SERIES)
    stores = {name: work / f"without-{name}.zarr" for name in names}
    if any(not (store / "catalogue.parquet").exists() for store in stores.values()):
        pairs = {}
        for seed, (name, place) in enumerate(SERIES.items()):
            full = binned(read_series(one_series(data / place)), binning)
            pairs[name] = {1.0: full, DOSE: simulate_low_dose(full, DOSE, seed)}
        for i, store in enumerate(stores.values()):
            layout.create(store)
            for j, (name, doses) in enumerate(pairs.items()):
                split = ("test", "val", "train", "train")[(j - i) % len(names)]
                layout.write_case(store, name, doses, patient=name, split=split)
            layout.finalise(store)
    return stores


def binned(volume: Volume, n: int) -> Volume:
    """Means over n x n voxels in plane; padding where any of them is."""
    if n == 1:
        return volume
    z, y, x = volume.shape
    cut = volume.hu[:, : y // n * n, : x // n * n].reshape(z, y // n, n, x // n, n)
    mean = np.rint(cut.mean(axis=(2, 4), dtype=np.float32)).astype(np.int16)
    hu = np.where((cut == AIR_HU).any(axis=(2, 4)), np.int16(AIR_HU), mean)
    dz, dy, dx = volume.spacing
    return replace(volume, hu=hu, spacing=(dz, n * dy, n * dx))
