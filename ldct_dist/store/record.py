"""A case's record: what is known of it besides its voxels, and how its zarr.json says so."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from ldct_dist.ct.volume import AIR_HU
from ldct_dist.errors import UserError
from ldct_dist.store.shards import LEVEL

FORMAT = "ldct_dist"
WORD = "[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
"""what cases and splits may be called: cases are folders"""


@dataclass(frozen=True)
class CaseRecord:
    """What is known of a case besides its voxels; nothing in it names the patient.

    body: share of voxels above BODY_HU in each chunk of the chunk grid, 0..255, C order.
    voxels, arrays: `voxel_hash` of each dose's voxels, and sha256 of its zarr.json.
    provenance: keyed hash of what it was made from.
    low_dose: how the doses below the full one were made. "made" is "acquired" or "simulated"; "config", if they were
    simulated here, is the `DoseConfig` with the photons and the cutoff that were matched to the scan.
    key_id: which key `patient` and `provenance` are hashed with.
    low_dose, key_id: None where it is not known, as in stores that were written before this was recorded.
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
    arrays: tuple[str, ...]
    noise_hu: float | None
    provenance: str
    body: bytes
    low_dose: dict[str, Any] | None = None
    key_id: str | None = None


def case_metadata(record: CaseRecord) -> bytes:
    """A case's zarr.json. It is a function of its record alone, so any byte that differs is damage."""
    body = {**asdict(record), "body": record.body.hex()}
    for later in ("low_dose", "key_id"):
        if body[later] is None:
            del body[later]  # so that the seals of older records hold
    seal = sha256(json.dumps(body).encode())
    return group_metadata({"ome": _ome(record), FORMAT: {**body, "seal": seal}})


def read_record(case: Path) -> CaseRecord:
    """The record of the case in folder `case`. Raises UserError if there is none, or one that is damaged, or newer than
    this package."""
    try:
        raw = (case / "zarr.json").read_bytes()
        body = json.loads(raw)["attributes"][FORMAT]
        seal = body.pop("seal")  # case_metadata works it out anew
        later = body.keys() - CaseRecord.__dataclass_fields__
        if later and seal == sha256(json.dumps(body).encode()):
            raise UserError(
                f"{case.parent.parent}: case {case.name} was ingested by a newer ldct_dist, which records its "
                f"{', '.join(sorted(later))}; update the package"
            )
        tuples = {k: tuple(v) for k, v in body.items() if isinstance(v, list)}
        tuples["direction"] = tuple(map(tuple, body["direction"]))
        record = CaseRecord(**{**body, **tuples, "body": bytes.fromhex(body["body"])})
        if raw != case_metadata(record):
            raise ValueError("its seal is broken")
    except FileNotFoundError as e:
        raise UserError(f"{case.parent.parent}: no case {case.name!r}; ldct-dist info lists them") from e
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(
            f"{case.parent.parent}: the record of case {case.name} is damaged; delete {case} and ingest it again"
        ) from e
    return record


def group_metadata(attributes: dict[str, Any]) -> bytes:
    """The zarr.json of a group."""
    return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": attributes}).encode()


def array_metadata(shape: Sequence[int], chunk: Sequence[int], shard: Sequence[int]) -> bytes:
    """The zarr.json of an array: int16 HU (z, y, x), as Zarr itself would write it."""
    little_endian = {"name": "bytes", "configuration": {"endian": "little"}}
    blosc = {"typesize": 2, "cname": "lz4", "clevel": LEVEL, "shuffle": "bitshuffle", "blocksize": 0}
    # crc32c last: it covers the compressed bytes, so damage is found before blosc decodes it
    codecs = [little_endian, {"name": "blosc", "configuration": blosc}, {"name": "crc32c"}]
    sharding = {
        "chunk_shape": list(chunk),
        "codecs": codecs,
        "index_codecs": [little_endian, {"name": "crc32c"}],
        "index_location": "end",
    }
    metadata = {
        "shape": list(shape),
        "data_type": "int16",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(shard)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": AIR_HU,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "attributes": {},
        "dimension_names": ["z", "y", "x"],
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }
    return json.dumps(metadata, indent=2).encode()


def sha256(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()


def voxel_hash(slices: Iterable[np.ndarray]) -> str:
    """sha256 of the crc32c of each slice of an array, as int16, in order.

    A sha256 of the voxels would take nine times as long. This one is to detect damage, and another case's voxels, not
    forgery, which could bring its own hash. A crc32c detects every change within two neighbouring voxels, and all but one
    in 2^32 of other changes to a slice.
    """
    bytes_ = (np.ascontiguousarray(image, "<i2").reshape(-1).view(np.uint8) for image in slices)
    checksums = map(google_crc32c.value, bytes_)  # copying to `bytes` would take half as long again
    return sha256(b"".join(checksum.to_bytes(4, "little") for checksum in checksums))


def array_hash(array: Path) -> str:
    """sha256 of an array's metadata; for its voxels there is `voxel_hash`."""
    return sha256((array / "zarr.json").read_bytes())


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
