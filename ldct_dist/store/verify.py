"""Every byte of a store against what was written with it."""

from __future__ import annotations

from pathlib import Path

from ldct_dist.errors import UserError
from ldct_dist.store import layout
from ldct_dist.store.reader import Store
from ldct_dist.store.record import array_hash, voxel_hash


def verify(path: Path) -> list[str]:
    """What is wrong with the store, one line each; empty if every byte is as it was written.

    Raises UserError if `path` is no store, or one whose catalogue cannot be read.
    """
    store = Store(path)
    faults = [f"{name}: there, but not in the catalogue" for name in _uncatalogued(store)]
    faults += _group_faults(store)
    for row in range(len(store.cases)):
        faults += _case_faults(store, row)
    return faults


def _group_faults(store: Store) -> list[str]:
    """Of the two zarr.json files that belong to no case; finalising writes the first one anew."""
    written = {
        "zarr.json": layout.root_metadata(layout.check_format(store.path)),
        f"{layout.CASES}/zarr.json": layout.CASES_METADATA,
    }
    return [
        f"{name}: not what was written; run ldct-dist ingest again"
        for name, content in written.items()
        if not (store.path / name).exists() or (store.path / name).read_bytes() != content
    ]


def _case_faults(store: Store, row: int) -> list[str]:
    name = store.cases[row].name
    faults = []
    try:
        record = store.record(name)
        if layout.catalogue([record]).to_pylist() != store.table.slice(row, 1).to_pylist():
            faults.append(f"{name}: its record and the catalogue disagree; run ldct-dist ingest again")
        for dose, voxels, array in zip(record.doses, record.voxels, record.arrays, strict=True):
            if voxel_hash(store.volume(name, dose).hu) != voxels:
                faults.append(f"{name}/{dose}: its voxels are not those that were ingested")
            if array_hash(store.path / layout.CASES / name / dose) != array:
                faults.append(
                    f"{name}/{dose}/zarr.json: not what was written; delete {name} and ingest it again"
                )
    except UserError as e:
        faults.append(str(e))
    return faults


def _uncatalogued(store: Store) -> list[str]:
    known = {case.name for case in store.cases}
    return [name for name in layout.list_cases(store.path) if name not in known]
