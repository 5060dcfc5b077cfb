"""The store's format on disk: how a case is laid out, and the catalogue of all cases.

STORE/zarr.json               root group; its attributes name the format
STORE/catalogue.parquet       one row a case: all that sampling needs without opening a case
STORE/cases/NAME/zarr.json    the case's record, and OME-Zarr 0.5 metadata
STORE/cases/NAME/1.00/        int16 HU (z, y, x): zarr.json and, up to SHARD_CAP, one shard file
STORE/cases/NAME/0.25/        the same at a quarter of the dose
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zarr
from zarr.codecs import BloscCodec, BloscShuffle, Crc32cCodec

from ldct_dist.ct.volume import AIR_HU, Volume
from ldct_dist.errors import UserError

FORMAT = "ldct_dist"
FORMAT_VERSION = 1
FULL_DOSE = "1.00"
CATALOGUE = "catalogue.parquet"
CASES = "cases"
TEMPORARY = ".writing-"
CHUNK = (64, 128, 128)  # 2 MiB of int16: large enough to stream, small enough to cut crops from
SHARD_CAP = 2 << 30
BODY_HU = -500  # between lung-free air and tissue: which part of a chunk shows the patient


@dataclass(frozen=True)
class CaseRecord:
    """What is known of a case besides its voxels; nothing in it names the patient.

    body: share of voxels above BODY_HU in each chunk of the chunk grid, 0..255, C order.
    voxels: sha256 of each dose's int16 voxels. provenance: keyed hash of what it was made from.
    """

    name: str
    patient: str
    split: str
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    origin: tuple[float, float, float]
    direction: tuple[tuple[float, float, float], ...]
    acquisition: dict[str, Any]
    chunk: tuple[int, int, int]
    doses: tuple[str, ...]
    voxels: tuple[str, ...]
    noise_hu: float | None
    provenance: str
    body: bytes


def dose_name(dose: float) -> str:
    return f"{dose:.2f}"


def chunk_shape(shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Chunks of at most CHUNK; a short axis is one chunk, and a long one is cut evenly.

    Even cuts keep the last chunk of an axis from being a sliver that costs a read for few voxels.
    """
    cut = []
    for size, limit in zip(shape, CHUNK, strict=True):
        pieces = -(-size // limit)
        cut.append(-(-size // pieces))
    return cut[0], cut[1], cut[2]


def create(path: Path) -> None:
    """Make an empty store, or check that `path` is one. Raises UserError if it is something else."""
    if (path / "zarr.json").exists():
        check_format(path)
        return
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: exists and is not a store; choose an empty or new folder")
    path.mkdir(parents=True, exist_ok=True)
    (path / CASES).mkdir(exist_ok=True)
    group = {"zarr_format": 3, "node_type": "group"}
    _replace(path / CASES / "zarr.json", json.dumps({**group, "attributes": {}}).encode())
    attributes = {FORMAT: {"version": FORMAT_VERSION}}
    _replace(path / "zarr.json", json.dumps({**group, "attributes": attributes}).encode())


def check_format(path: Path) -> None:
    """Raises UserError unless `path` is a store of a version this package reads."""
    try:
        attributes = json.loads((path / "zarr.json").read_bytes())["attributes"]
        version = attributes[FORMAT]["version"]
    except FileNotFoundError as e:
        raise UserError(f"{path}: not a store (no zarr.json); make one with ldct-dist ingest") from e
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path}: a Zarr group, but not one that ldct-dist ingest made") from e
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path}: store format {version}, this ldct_dist reads {FORMAT_VERSION}; update the package"
        )


def write_case(
    store: Path,
    name: str,
    doses: Mapping[float, Volume],
    *,
    patient: str,
    split: str,
    provenance: str = "",
    noise_hu: float | None = None,
) -> CaseRecord:
    """Write a case whole: it appears under its name in one rename, or not at all. One that is there goes.

    doses: dose fraction to Volume, all on one grid. patient: the keyed hash, never the ID.
    """
    names = {dose_name(d): v for d, v in sorted(doses.items(), reverse=True)}
    full = next(iter(names.values()))
    record = CaseRecord(
        name=name,
        patient=patient,
        split=split,
        shape=full.shape,
        spacing=full.spacing,
        origin=full.origin,
        direction=full.direction,
        acquisition=asdict(full.acquisition),
        chunk=chunk_shape(full.shape),
        doses=tuple(names),
        voxels=tuple(voxel_hash(v.hu) for v in names.values()),
        noise_hu=noise_hu,
        provenance=provenance,
        body=body_share(full.hu, chunk_shape(full.shape)),
    )
    temporary = store / CASES / f"{TEMPORARY}{name}-{os.getpid()}-{secrets.token_hex(3)}"
    replaced = temporary.with_name(f"{temporary.name}-replaced")
    try:
        group = zarr.open_group(temporary, mode="w", zarr_format=3)
        for dose, volume in names.items():
            _write_array(group, dose, volume.hu, record.chunk)
        group.attrs.put({"ome": _ome(record), FORMAT: _to_json(record)})
        _sync_tree(temporary)
        if (store / CASES / name).exists():
            (store / CASES / name).rename(replaced)
        temporary.rename(store / CASES / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
    return record


def read_record(case: Path) -> CaseRecord:
    """The record of the case in folder `case`. Raises UserError if there is none, or one that is damaged."""
    try:
        body = json.loads((case / "zarr.json").read_bytes())["attributes"][FORMAT]
        tuples = {k: tuple(v) for k, v in body.items() if isinstance(v, list)}
        tuples["direction"] = tuple(map(tuple, body["direction"]))
        return CaseRecord(**{**body, **tuples, "body": bytes.fromhex(body["body"])})
    except FileNotFoundError as e:
        raise UserError(f"{case.parent.parent}: no case {case.name!r}; ldct-dist info lists them") from e
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(
            f"{case.parent.parent}: the record of case {case.name} is damaged; delete {case} and ingest it again"
        ) from e


def list_cases(store: Path) -> list[str]:
    """Names of the cases that are there whole, sorted."""
    return sorted(p.name for p in (store / CASES).iterdir() if p.is_dir() and not p.name.startswith("."))


def finalise(store: Path) -> int:
    """Write the catalogue of the cases that are there; how many. Leftovers of killed writers go.

    Not while cases are being written. Raises UserError if `store` is not a store, if a case's record is
    damaged, or if a patient stands in more than one split.
    """
    check_format(store)
    for leftover in (store / CASES).glob(f"{TEMPORARY}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    records = [read_record(store / CASES / name) for name in list_cases(store)]
    splits: dict[str, set[str]] = {}
    for r in records:
        splits.setdefault(r.patient, set()).add(r.split)
    leaking = {p: s for p, s in splits.items() if len(s) > 1}
    if leaking:
        cases = [r.name for r in records if r.patient in leaking]
        raise UserError(
            f"{store}: {len(leaking)} patient(s) stand in more than one split ({', '.join(cases[:6])}); "
            "give every case of a patient the same split and ingest these again"
        )
    rows = [{**asdict(r), "acquisition": json.dumps(r.acquisition)} for r in records]
    table = pa.Table.from_pylist(rows, schema=_SCHEMA).replace_schema_metadata(
        {"fingerprint": _fingerprint(records)}
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    _replace(store / CATALOGUE, sink.getvalue().to_pybytes())
    return len(records)


def voxel_hash(hu: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(hu, dtype="<i2").data).hexdigest()


def body_share(hu: np.ndarray, chunk: tuple[int, int, int]) -> bytes:
    """Share of voxels above BODY_HU in each chunk, as one byte (255: all), C order of the chunk grid."""
    starts = [range(0, size, c) for size, c in zip(hu.shape, chunk, strict=True)]
    body = hu > BODY_HU
    return bytes(
        round(255 * float(body[z : z + chunk[0], y : y + chunk[1], x : x + chunk[2]].mean()))
        for z in starts[0]
        for y in starts[1]
        for x in starts[2]
    )


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
        "noise_hu": pa.float64(),
        "provenance": pa.string(),
        "body": pa.binary(),
    }
)


def _write_array(group: zarr.Group, name: str, hu: np.ndarray, chunk: tuple[int, int, int]) -> None:
    grid = [-(-size // c) for size, c in zip(hu.shape, chunk, strict=True)]
    layer = 2 * chunk[0] * grid[1] * chunk[1] * grid[2] * chunk[2]  # bytes of one layer of chunks
    layers = max(1, min(grid[0], SHARD_CAP // layer))
    array = group.create_array(
        name,
        shape=hu.shape,
        dtype="int16",
        chunks=chunk,
        shards=(layers * chunk[0], grid[1] * chunk[1], grid[2] * chunk[2]),
        # crc32c last: it covers the compressed bytes, so damage is found before blosc decodes it
        compressors=[BloscCodec(cname="lz4", clevel=5, shuffle=BloscShuffle.bitshuffle), Crc32cCodec()],
        fill_value=AIR_HU,
        dimension_names=("z", "y", "x"),
    )
    array[:] = hu


def _ome(record: CaseRecord) -> dict[str, Any]:
    """OME-Zarr 0.5: each dose is an image of one resolution."""
    axes = [{"name": a, "type": "space", "unit": "millimeter"} for a in "zyx"]
    transforms = [
        {"type": "scale", "scale": list(record.spacing)},
        {"type": "translation", "translation": list(record.origin[::-1])},
    ]
    datasets = ({"path": d, "coordinateTransformations": transforms} for d in record.doses)
    return {
        "version": "0.5",
        "multiscales": [{"name": d["path"], "axes": axes, "datasets": [d]} for d in datasets],
    }


def _to_json(record: CaseRecord) -> dict[str, Any]:
    return {**asdict(record), "body": record.body.hex()}


def _fingerprint(records: list[CaseRecord]) -> str:
    facts = [[r.name, r.split, r.shape, r.chunk, r.doses, r.voxels] for r in records]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)


def _sync_tree(root: Path) -> None:
    """fsync all of `root`, files and folders, so that a case that has its name also has its bytes."""
    for path in (root, *root.rglob("*")):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
