"""Voxels straight from a shard file: for each chunk one read, one checksum, one decode.

This reads what `layout` writes and nothing else: Zarr v3 sharding with the index at the shard's end, and
chunks of little-endian int16, compressed by blosc and sealed by crc32c. General readers take twice the
time on a core (bench/loader.py has the figures), most of it in copies and in memory taken anew each time.
Reading and decoding release the GIL.
"""

from __future__ import annotations

import json
import os
from io import FileIO
from itertools import product
from pathlib import Path

import google_crc32c
import numpy as np
from numcodecs import blosc

from ldct_dist.ct.volume import AIR_HU

Region = tuple[slice, slice, slice]
Triple = tuple[int, int, int]

EMPTY = np.iinfo(np.uint64).max  # offset, in a shard's index, of a chunk that holds nothing but air
CODECS = ["bytes", "blosc", "crc32c"]
CRC_BYTES = 4
CRC_RESIDUE = 0x48674BC7  # the crc32c of any bytes that end in their own crc32c


class DamagedError(Exception):
    """Bytes on disk are not those that were written; the message says which."""


class ShardedArray:
    """One array of a store, open for reading; safe to share between threads.

    Files are opened when they are first needed, and closed with the last reference to the array.
    Raises DamagedError if the array's metadata is not what `layout` wrote for this shape and chunk.
    """

    def __init__(self, path: Path, shape: Triple, chunk: Triple) -> None:
        self.path, self.shape, self.chunk = path, shape, chunk
        self._grid = tuple(-(-size // c) for size, c in zip(shape, chunk, strict=True))
        self._layers = self._check_metadata() // chunk[0]
        self._shards: dict[int, tuple[FileIO, np.ndarray]] = {}

    def read(self, region: Region, out: np.ndarray) -> None:
        """Fill `out` with the int16 HU of `region`.

        Raises DamagedError where a checksum fails or the array ends too soon, and OSError as the file
        system does.
        """
        if any(r.stop > n for r, n in zip(region, self.shape, strict=True)):
            raise DamagedError(f"it holds {self.shape} voxels, fewer than its record says")
        scratch = np.empty(self.chunk, np.int16)
        touched = (range(r.start // c, -(-r.stop // c)) for r, c in zip(region, self.chunk, strict=True))
        for index in product(*touched):
            self._read_chunk(index, scratch)
            source, target = [], []
            for i, c, r in zip(index, self.chunk, region, strict=True):
                start, stop = max(i * c, r.start), min((i + 1) * c, r.stop)
                source.append(slice(start - i * c, stop - i * c))
                target.append(slice(start - r.start, stop - r.start))
            out[tuple(target)] = scratch[tuple(source)]

    def shards(self) -> list[str]:
        """The array's shard files, relative to its path."""
        return [_shard_file(number) for number in range(-(-self._grid[0] // self._layers))]

    def check(self) -> None:
        """Raises DamagedError or OSError unless every chunk's checksum holds; decodes none."""
        for index in product(*map(range, self._grid)):
            self._stored_chunk(index)

    def _read_chunk(self, index: tuple[int, ...], out: np.ndarray) -> None:
        stored = self._stored_chunk(index)
        if stored is None:
            out.fill(AIR_HU)
        else:
            blosc.decompress(stored, out)

    def _stored_chunk(self, index: tuple[int, ...]) -> memoryview | None:
        """A chunk as it was compressed; None if it holds nothing but air."""
        z, y, x = index
        shard, layer = divmod(z, self._layers)
        file, entries = self._shard(shard)
        offset, size = entries[(layer * self._grid[1] + y) * self._grid[2] + x]
        if offset == EMPTY:
            return None
        return _unsealed(os.pread(file.fileno(), int(size), int(offset)), f"chunk {z}/{y}/{x}")

    def _shard(self, number: int) -> tuple[FileIO, np.ndarray]:
        """A shard's file and its index: for each chunk of it, in C order, (offset, size) in bytes."""
        if number not in self._shards:
            file = FileIO(self.path / _shard_file(number))
            size = 16 * self._layers * self._grid[1] * self._grid[2] + CRC_BYTES
            end = os.fstat(file.fileno()).st_size
            sealed = os.pread(file.fileno(), size, max(0, end - size))
            entries = np.frombuffer(_unsealed(sealed, f"index of shard {number}"), "<u8").reshape(-1, 2)
            # two threads may both come here: either's file will do
            self._shards[number] = file, entries
        return self._shards[number]

    def _check_metadata(self) -> int:
        """Slices in a shard. Only what this class relies on is checked, and all of it is."""
        try:
            meta = json.loads((self.path / "zarr.json").read_bytes())
            shard = meta["chunk_grid"]["configuration"]["chunk_shape"]
            sharding = meta["codecs"][0]["configuration"]
            inner = [c["name"] for c in sharding["codecs"]]
            facts = (meta["shape"], meta["data_type"], meta["fill_value"], sharding["chunk_shape"], inner)
        except (ValueError, KeyError, IndexError, TypeError) as e:
            raise DamagedError(f"zarr.json is not an array's metadata: {e!r}") from e
        whole = [shard[0], *(g * c for g, c in zip(self._grid[1:], self.chunk[1:], strict=True))]
        if facts != (list(self.shape), "int16", AIR_HU, list(self.chunk), CODECS) or shard != whole:
            raise DamagedError("zarr.json is not what was written for this case")
        return shard[0]


def _shard_file(number: int) -> str:
    return f"c/{number}/0/0"


def _unsealed(sealed: bytes, what: str) -> memoryview:
    """The bytes before the crc32c that closes them."""
    if google_crc32c.value(sealed) != CRC_RESIDUE:
        raise DamagedError(f"checksum of {what} fails")
    return memoryview(sealed)[:-CRC_BYTES]
