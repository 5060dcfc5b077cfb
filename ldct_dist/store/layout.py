"""The store's format on disk: how a case is laid out, and the catalogue of all cases.

STORE/zarr.json               root group; its attributes name the format
STORE/catalogue.parquet       one row a case: all that sampling needs without opening a case
STORE/cases/NAME/zarr.json    the case's record, and OME-Zarr 0.5 metadata
STORE/cases/NAME/1.00/        int16 HU (z, y, x): zarr.json and, up to SHARD_CAP, one shard file
STORE/cases/NAME/0.25/        the same at a quarter of the dose

Every byte is covered by a hash: the root has that of the catalogue, which repeats every record; a record has those of
itself, of the metadata of its arrays and of their voxels.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from ldct_dist.ct.volume import Volume
from ldct_dist.errors import UserError, few
from ldct_dist.files import TEMPORARY, replace, sync_tree, unfinished
from ldct_dist.store.record import (
    FORMAT,
    CaseRecord,
    array_hash,
    array_metadata,
    case_metadata,
    group_metadata,
    read_record,
    sha256,
    voxel_hash,
)
from ldct_dist.store.shards import write_shards

FORMAT_VERSION = 2
FULL_DOSE = "1.00"
CATALOGUE = "catalogue.parquet"
CASES = "cases"
CHUNK = (64, 128, 128)  # 2 MiB of int16: large enough to stream, small enough to cut crops from
SHARD_CAP = 2 << 30
BODY_HU = -500  # between air and tissue: voxels above it count as the patient's body
CASES_METADATA = group_metadata({})  # the zarr.json of the group of all cases


def dose_name(dose: float) -> str:
    """The name of a dose fraction, with two decimals or, if it has more, up to four: 0.25, 0.125."""
    text = f"{dose:.4f}"
    return text.removesuffix("00") if text.endswith("00") else text.rstrip("0")


def chunk_shape(shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """The chunks of an array of this shape: at most CHUNK; a short axis is one chunk, and a long one is cut evenly.

    Otherwise the last chunk of an axis might be thin, and cost a read for few voxels.
    """
    cut = []
    for size, limit in zip(shape, CHUNK, strict=True):
        pieces = -(-size // limit)
        cut.append(-(-size // pieces))
    return cut[0], cut[1], cut[2]


def check_place(path: Path) -> None:
    """Raises UserError unless a store can be made at `path`, or `path` is one that this package reads."""
    taken = path.exists() and not (path.is_dir() and all(_is_temporary(p) for p in path.iterdir()))
    # Checked last: if another process is making the same store just now, its zarr.json is there by now.
    if (path / "zarr.json").exists():
        check_format(path)
    elif taken:
        raise UserError(f"{path}: exists and is not a store; choose an empty or new folder")


def create(path: Path) -> None:
    """Make an empty store, or go on with the one at `path`. Raises UserError if it is something else."""
    check_place(path)
    if not (path / "zarr.json").exists():
        path.mkdir(parents=True, exist_ok=True)
        # Written first: from now on other processes, and later ones, see that this is a store.
        replace(path / "zarr.json", root_metadata())
    (path / CASES).mkdir(exist_ok=True)
    if not (path / CASES / "zarr.json").exists():
        replace(path / CASES / "zarr.json", CASES_METADATA)


def check_format(path: Path) -> str | None:
    """The sha256 of the catalogue, None while it is still to be written.

    Raises UserError unless `path` is a store of a version this package reads.
    """
    try:
        attributes = json.loads((path / "zarr.json").read_bytes())["attributes"]
        version = attributes[FORMAT]["version"]
    except (FileNotFoundError, NotADirectoryError) as e:
        raise UserError(f"{path}: not a store (no zarr.json); make one with ldct-dist ingest") from e
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); make it readable") from e
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path}: not a store that ldct-dist ingest made; give another folder") from e
    if version != FORMAT_VERSION:
        older = version in range(FORMAT_VERSION)
        todo = "ingest its source again, into a new folder" if older else "update the package"
        raise UserError(f"{path}: store format {version}, this ldct_dist reads {FORMAT_VERSION}; {todo}")
    return attributes[FORMAT].get("catalogue")


def root_metadata(catalogue: str | None = None) -> bytes:
    """The root's zarr.json; `catalogue`: the sha256 of the catalogue, once it is there."""
    seal = {"catalogue": catalogue} if catalogue else {}
    return group_metadata({FORMAT: {"version": FORMAT_VERSION, **seal}})


def write_case(
    store: Path,
    name: str,
    doses: Mapping[float, Volume],
    *,
    patient: str,
    split: str,
    provenance: str = "",
    noise_hu: float | None = None,
    low_dose: dict[str, Any] | None = None,
    key_id: str | None = None,
) -> CaseRecord:
    """Write a case: it appears under its name in one rename, or not at all, and replaces one that is there.

    doses: dose fraction to Volume, all on one grid. patient: the keyed hash, never the ID. provenance, noise_hu,
    low_dose and key_id: as in CaseRecord.
    """
    names = {dose_name(d): v for d, v in sorted(doses.items(), reverse=True)}
    full = next(iter(names.values()))
    chunk = chunk_shape(full.shape)
    temporary = unfinished(store / CASES / name)
    replaced = temporary.with_name(f"{temporary.name}-replaced")
    try:
        temporary.mkdir()
        with ThreadPoolExecutor(len(names)) as writers:  # one compresses while the disk writes another's
            list(writers.map(lambda dose: _write_array(temporary / dose, names[dose].hu, chunk), names))
        record = CaseRecord(
            name=name,
            patient=patient,
            split=split,
            shape=full.shape,
            spacing=full.spacing,
            origin=full.origin,
            direction=full.direction,
            acquisition=asdict(full.acquisition),
            chunk=chunk,
            doses=tuple(names),
            voxels=tuple(voxel_hash(v.hu) for v in names.values()),
            arrays=tuple(array_hash(temporary / dose) for dose in names),
            noise_hu=noise_hu,
            provenance=provenance,
            body=body_share(full.hu, chunk),
            low_dose=low_dose,
            key_id=key_id,
        )
        (temporary / "zarr.json").write_bytes(case_metadata(record))
        sync_tree(temporary)
        if (store / CASES / name).exists():
            (store / CASES / name).rename(replaced)
        temporary.rename(store / CASES / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)
    return record


def list_cases(store: Path) -> list[str]:
    """Names of the cases that are there whole, sorted."""
    return sorted(p.name for p in (store / CASES).iterdir() if p.is_dir() and not p.name.startswith("."))


def finalise(store: Path) -> int:
    """Write the catalogue of the cases that are there, and delete what killed writers have left; the number of cases.

    Do not call it while cases are being written. Raises UserError if `store` is not a store, if a case's record is
    damaged, if patients were hashed with more than one key, or if one is in more than one split.
    """
    # It imports pyarrow, which the processes of an ingest do not need.
    from ldct_dist.store.catalogue import parquet

    check_format(store)
    _sweep(store)
    _sweep(store / CASES)
    records = [read_record(store / CASES / name) for name in list_cases(store)]
    keys = Counter(r.key_id for r in records if r.key_id is not None)
    if len(keys) > 1:
        (usual, _), *_ = keys.most_common(1)
        cases = [r.name for r in records if r.key_id not in (usual, None)]
        raise UserError(
            f"{store}: {len(cases)} case(s) were ingested with another key than the others ({few(cases, ', ')}), so a "
            "patient may be in it twice; delete these cases, and ingest them again with the others' key (key=)"
        )
    splits: dict[str, set[str]] = {}
    for r in records:
        splits.setdefault(r.patient, set()).add(r.split)
    leaking = {p: s for p, s in splits.items() if len(s) > 1}
    if leaking:
        cases = [r.name for r in records if r.patient in leaking]
        raise UserError(
            f"{store}: {len(leaking)} patient(s) are in more than one split ({few(cases, ', ')}); "
            "give every case of a patient the same split and ingest these again"
        )
    content = parquet(records)
    replace(store / CASES / "zarr.json", CASES_METADATA)
    replace(store / CATALOGUE, content)
    # Written last: until the root has the catalogue's hash, the store counts as unfinished.
    replace(store / "zarr.json", root_metadata(sha256(content)))
    return len(records)


def body_share(hu: np.ndarray, chunk: tuple[int, int, int]) -> bytes:
    """Share of voxels above BODY_HU in each chunk, as one byte (255: all), C order of the chunk grid."""
    starts = [range(0, size, c) for size, c in zip(hu.shape, chunk, strict=True)]
    parts = (
        hu[tuple(slice(s, s + c) for s, c in zip(start, chunk, strict=True))] for start in product(*starts)
    )
    return bytes(round(255 * (np.count_nonzero(part > BODY_HU) / part.size)) for part in parts)


def shard_count(shape: tuple[int, int, int]) -> int:
    """Shard files of an array: one up to SHARD_CAP."""
    chunk = chunk_shape(shape)
    layers, grid = _shard_layers(shape, chunk)
    return -(-grid[0] // layers)


def _shard_layers(shape: Sequence[int], chunk: tuple[int, int, int]) -> tuple[int, list[int]]:
    """(layers of chunks in a shard, the chunk grid)."""
    grid = [-(-size // c) for size, c in zip(shape, chunk, strict=True)]
    layer = 2 * chunk[0] * grid[1] * chunk[1] * grid[2] * chunk[2]  # bytes of one layer of chunks
    return max(1, min(grid[0], SHARD_CAP // layer)), grid


def _write_array(array: Path, hu: np.ndarray, chunk: tuple[int, int, int]) -> None:
    layers, grid = _shard_layers(hu.shape, chunk)
    array.mkdir()
    shard = (layers * chunk[0], grid[1] * chunk[1], grid[2] * chunk[2])
    (array / "zarr.json").write_bytes(array_metadata(hu.shape, chunk, shard))
    write_shards(array, hu, chunk, layers)


def _is_temporary(path: Path) -> bool:
    return path.name.startswith(TEMPORARY)


def _sweep(folder: Path) -> None:
    """Remove what killed writers left behind."""
    for leftover in filter(_is_temporary, folder.iterdir()):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()
