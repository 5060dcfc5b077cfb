"""Checking every byte of a store against the hashes that were written with it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from ldct_dist.errors import UserError
from ldct_dist.store import layout
from ldct_dist.store.catalogue import catalogue
from ldct_dist.store.reader import Store
from ldct_dist.store.record import CaseRecord, array_hash, read_record, voxel_hash
from ldct_dist.store.shards import DamagedError, ShardedArray


def verify(path: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> list[str]:
    """What is wrong with the store, one line each; empty if every byte is as it was written.

    Cases are checked on all cores at once, each in little memory. `progress` hears how many of how many
    are done. Raises UserError if `path` is no store at all.
    """
    rows: dict[str, pa.Table] | None = None
    try:
        store = Store(path)
        rows = {name: store.table.slice(i, 1) for i, name in enumerate(store.table["name"].to_pylist())}
        faults = _group_faults(path)
    except UserError as e:
        if not (path / layout.CASES).is_dir():
            raise
        faults = [str(e)]  # the cases can be checked without a catalogue
    there = layout.list_cases(path) if (path / layout.CASES).is_dir() else []
    cases = sorted({*there, *(rows or ())})
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        for done, found in enumerate(threads.map(partial(_case_faults, path, rows), cases), start=1):
            faults += found
            progress(done, len(cases))
    return faults


def _group_faults(path: Path) -> list[str]:
    """What is wrong with the two zarr.json files that belong to no case."""
    written = {
        "zarr.json": layout.root_metadata(layout.check_format(path)),
        f"{layout.CASES}/zarr.json": layout.CASES_METADATA,
    }
    return [
        f"{name}: not what was written; run ldct-dist ingest again"
        for name, content in written.items()
        if not (path / name).exists() or (path / name).read_bytes() != content
    ]


def _case_faults(path: Path, rows: dict[str, pa.Table] | None, name: str) -> list[str]:
    """What is wrong with a case. rows: the catalogue's, by case name; None if the catalogue could not be read."""
    try:
        record = read_record(path / layout.CASES / name)
    except UserError as e:
        return [str(e)]
    faults = []
    if rows is not None and name not in rows:
        faults.append(f"{name}: there, but not in the catalogue; run ldct-dist ingest again")
    elif rows is not None and rows[name].to_pylist() != catalogue([record]).to_pylist():
        faults.append(f"{name}: its record and the catalogue disagree; run ldct-dist ingest again")
    for dose, voxels, metadata in zip(record.doses, record.voxels, record.arrays, strict=True):
        if fault := _array_fault(path / layout.CASES / name / dose, record, voxels, metadata):
            faults.append(f"{name}/{dose}: {fault}; delete {layout.CASES}/{name} and ingest it again")
    return faults


def _array_fault(array: Path, record: CaseRecord, voxels: str, metadata: str) -> str | None:
    try:
        if array_hash(array) != metadata:
            return "its zarr.json is not what was written"
        if voxel_hash(_slices(ShardedArray(array, record.shape, record.chunk))) != voxels:
            return "its voxels are not those that were ingested"
    except DamagedError as e:
        return f"damaged ({e})"
    except OSError as e:
        return f"cannot be read ({e})"
    return None


def _slices(array: ShardedArray) -> Iterator[np.ndarray]:
    """All slices of an array, of which only one layer of chunks is in memory at a time."""
    depth, height, width = array.shape
    for top in range(0, depth, array.chunk[0]):
        slab = np.empty((min(array.chunk[0], depth - top), height, width), "<i2")
        array.read((slice(top, top + len(slab)), slice(0, height), slice(0, width)), slab)
        yield from slab
