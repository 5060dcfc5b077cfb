"""Voxels directly to and from shard files: for each chunk one write or read, one checksum, one pass of the codec.

The format is Zarr v3's shards with the index at the end, and chunks of little-endian int16 that are compressed by blosc
and followed by a crc32c; other arrays are not read. General libraries take twice as long on a core (for figures see
bench/loader.py and bench/ingest.py), most of it for copies and for allocating memory. Reading, writing and the codec
release the GIL.
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
from ldct_dist.store.direct import DirectWriter

Region = tuple[slice, slice, slice]
Triple = tuple[int, int, int]

EMPTY = np.iinfo(np.uint64).max  # offset, in a shard's index, of a chunk that holds nothing but air
CODECS = ["bytes", "blosc", "crc32c"]
LEVEL = 1  # of blosc's compression: higher ones save 1 % of the size for a quarter more time
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
            source, target = [], []
            for i, c, r in zip(index, self.chunk, region, strict=True):
                start, stop = max(i * c, r.start), min((i + 1) * c, r.stop)
                source.append(slice(start - i * c, stop - i * c))
                target.append(slice(start - r.start, stop - r.start))
            part = out[tuple(target)]
            # A whole chunk is decoded directly into `out`: a copy would take a fifth of the time for decoding.
            if part.shape == self.chunk and part.flags.c_contiguous:
                self._read_chunk(index, part)
            else:
                self._read_chunk(index, scratch)
                part[...] = scratch[tuple(source)]

    def shards(self) -> list[str]:
        """The array's shard files, relative to its path."""
        return [_shard_file(number) for number in range(-(-self._grid[0] // self._layers))]

    def check(self) -> None:
        """Raises DamagedError or OSError unless every chunk's checksum is right. Decodes no chunk."""
        for index in product(*map(range, self._grid)):
            self._stored_chunk(index)

    def _read_chunk(self, index: tuple[int, ...], out: np.ndarray) -> None:
        stored = self._stored_chunk(index)
        if stored is None:
            out.fill(AIR_HU)
        else:
            blosc.decompress(stored, out)

    def _stored_chunk(self, index: tuple[int, ...]) -> memoryview | None:
        """A chunk's compressed bytes; None if it holds nothing but air."""
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
            # Two threads may come here at once: it does not matter whose file is kept.
            self._shards[number] = file, entries
        return self._shards[number]

    def _check_metadata(self) -> int:
        """The number of slices in a shard. Checks all that this class relies on, and nothing else."""
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


def write_shards(path: Path, hu: np.ndarray, chunk: Triple, layers: int) -> None:
    """Write `hu`, int16 (z, y, x), as the shards of the array at `path`, each of `layers` layers of chunks.

    The bytes are those that Zarr would write, except that Zarr leaves out shards of nothing but air: here, a shard that is
    not there has been lost.
    """
    grid = [-(-size // c) for size, c in zip(hu.shape, chunk, strict=True)]
    scratch = np.empty(chunk, "<i2")
    middle = tuple(size // 2 for size in chunk)  # seldom air, which saves looking at all voxels
    for number in range(-(-grid[0] // layers)):
        file = path / _shard_file(number)
        file.parent.mkdir(parents=True)
        entries = np.full((layers, *grid[1:], 2), EMPTY, "<u8")
        with DirectWriter(file) as shard:
            for z, y, x in sorted(np.ndindex(layers, *grid[1:]), key=_morton):
                part = hu[_span(number * layers + z, chunk[0]), _span(y, chunk[1]), _span(x, chunk[2])]
                if part.shape != chunk:
                    scratch.fill(AIR_HU)
                scratch[tuple(map(slice, part.shape))] = part
                if scratch[middle] != AIR_HU or (scratch != AIR_HU).any():
                    stored = blosc.compress(scratch, b"lz4", LEVEL, blosc.BITSHUFFLE, typesize=2)
                    entries[z, y, x] = shard.tell(), len(stored) + CRC_BYTES
                    _write_sealed(shard, stored)
            _write_sealed(shard, entries.tobytes())


def _span(index: int, size: int) -> slice:
    return slice(index * size, (index + 1) * size)


def _morton(index: tuple[int, ...]) -> int:
    """A chunk's Morton number, by which Zarr orders a shard's chunks: the bits of its indices interleaved."""
    bits = ((i >> bit & 1) << 3 * bit + axis for axis, i in enumerate(index) for bit in range(i.bit_length()))
    return sum(bits)


def _write_sealed(shard: DirectWriter, content: bytes) -> None:
    shard.write(content)
    shard.write(google_crc32c.value(content).to_bytes(CRC_BYTES, "little"))


def _shard_file(number: int) -> str:
    return f"c/{number}/0/0"


def _unsealed(sealed: bytes, what: str) -> memoryview:
    """`sealed` without the crc32c at its end. Raises DamagedError if that is wrong; `what` it is, for the message."""
    if google_crc32c.value(sealed) != CRC_RESIDUE:
        raise DamagedError(f"checksum of {what} fails")
    return memoryview(sealed)[:-CRC_BYTES]
