"""Every voxel of a store against the hashes written with it."""

from __future__ import annotations

from pathlib import Path

from ldct_dist.errors import UserError
from ldct_dist.store import layout
from ldct_dist.store.reader import Store


def verify(path: Path) -> list[str]:
    """What is wrong with the store, one line each; empty if every byte is as it was written.

    Raises UserError if `path` is no store, or one whose catalogue cannot be read.
    """
    store = Store(path)
    faults = [f"{name}: there, but not in the catalogue" for name in _uncatalogued(store)]
    for case in store.cases:
        try:
            record = store.record(case.name)
            if record.shape != case.shape or record.split != case.split or record.doses != case.doses:
                faults.append(f"{case.name}: its record and the catalogue disagree")
            for dose, written in zip(record.doses, record.voxels, strict=True):
                if layout.voxel_hash(store.volume(case.name, dose).hu) != written:
                    faults.append(f"{case.name}/{dose}: its voxels are not those that were ingested")
        except UserError as e:
            faults.append(str(e))
    return faults


def _uncatalogued(store: Store) -> list[str]:
    known = {case.name for case in store.cases}
    return [name for name in layout.list_cases(store.path) if name not in known]
