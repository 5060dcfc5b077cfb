"""Four patients' quiet series, each left out once: stores that differ in nothing but their splits."""

from __future__ import annotations

from pathlib import Path

from ldct_dist.ct.dicom import one_series, read_series
from ldct_dist.ct.dose import simulate_low_dose
from ldct_dist.store import layout

DOSE = 0.25
SERIES = {
    "CRLM-CT-1004": "colorectal-liver/CRLM-CT-1004",
    "CRLM-CT-1006": "colorectal-liver/CRLM-CT-1006",
    "A0001": "lung-pet-ct-dx/A0001/series-3",
    "A0002": "lung-pet-ct-dx/A0002/series-3-B40f",
}


def folds(data: Path, work: Path) -> dict[str, Path]:
    """Patient -> the store in which it is the test split, the next patient validation, the other two training.

    Made once. Raises UserError for a series that is not there.
    """
    names = list(SERIES)
    stores = {name: work / f"without-{name}.zarr" for name in names}
    if any(not (store / "catalogue.parquet").exists() for store in stores.values()):
        pairs = {}
        for seed, (name, place) in enumerate(SERIES.items()):
            full = read_series(one_series(data / place))
            pairs[name] = {1.0: full, DOSE: simulate_low_dose(full, DOSE, seed)}
        for i, store in enumerate(stores.values()):
            layout.create(store)
            for j, (name, doses) in enumerate(pairs.items()):
                split = ("test", "val", "train", "train")[(j - i) % len(names)]
                layout.write_case(store, name, doses, patient=name, split=split)
            layout.finalise(store)
    return stores
