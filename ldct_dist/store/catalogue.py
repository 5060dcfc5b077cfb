"""The columnar catalogue of a store's cases: a row for each, which holds all of its record."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

import pyarrow as pa
import pyarrow.parquet as pq

from ldct_dist.store.record import CaseRecord, sha256

_VECTOR = pa.list_(pa.float64(), 3)
_SHAPE = pa.list_(pa.int32(), 3)
_SCHEMA = pa.schema(
    {
        "name": pa.string(),
        "patient": pa.string(),
        "split": pa.string(),
        "shape": _SHAPE,
        "spacing": _VECTOR,
        "origin": _VECTOR,
        "direction": pa.list_(_VECTOR, 3),
        "acquisition": pa.string(),
        "chunk": _SHAPE,
        "doses": pa.list_(pa.string()),
        "voxels": pa.list_(pa.string()),
        "arrays": pa.list_(pa.string()),
        "noise_hu": pa.float64(),
        "provenance": pa.string(),
        "body": pa.binary(),
        "low_dose": pa.string(),
        "key_id": pa.string(),
    }
)


def parquet(records: Sequence[CaseRecord]) -> bytes:
    """The catalogue of these cases as a Parquet file, whose metadata holds the store's fingerprint."""
    sink = pa.BufferOutputStream()
    fingerprint = {"fingerprint": _fingerprint(records)}
    pq.write_table(catalogue(records).replace_schema_metadata(fingerprint), sink)
    return sink.getvalue().to_pybytes()


def catalogue(records: Sequence[CaseRecord]) -> pa.Table:
    """The catalogue of these cases: a row for each, which holds all of its record."""
    rows = [
        {
            **asdict(r),
            "acquisition": json.dumps(r.acquisition),
            "low_dose": r.low_dose and json.dumps(r.low_dose),
        }
        for r in records
    ]
    return pa.Table.from_pylist(rows, schema=_SCHEMA)


def completed(table: pa.Table) -> pa.Table:
    """The catalogue `table` with the columns that it was written without, empty."""
    for field in _SCHEMA:
        if field.name not in table.column_names:
            table = table.append_column(field, pa.nulls(len(table), field.type))
    return table


def _fingerprint(records: Sequence[CaseRecord]) -> str:
    facts = [[r.name, r.split, r.shape, r.chunk, r.doses, r.voxels] for r in records]
    return sha256(json.dumps(facts).encode())
