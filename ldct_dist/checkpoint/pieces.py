"""Files of tensors that ranks hold in pieces, written without any rank holding a tensor whole.

Each file is safetensors, written by the rank that owns it. The other ranks send that one their pieces, a few MiB at a
time, and each piece goes straight to its place in the file. The file does not depend on which rank held what, so it can
be loaded at any number of ranks, by any strategy.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from io import FileIO
from math import prod
from pathlib import Path

import torch
import torch.distributed as dist

from ldct_dist.files import file_sha256
from ldct_dist.models.weights import SEAL, sealed
from ldct_dist.world import World

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}
UNSEALED = "0" * 64
CHUNK = 4 * 2**20
"""elements sent at a time"""


@dataclass(frozen=True)
class Piece:
    """What this rank holds of a tensor of `shape`: its elements from `start` on in C order, as one-dimensional `values`;
    empty if it holds none. room: a tensor as large, for the copy that is saved; None: the Saver allocates one."""

    shape: tuple[int, ...]
    start: int
    values: torch.Tensor
    room: torch.Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype


Stored = torch.Tensor | Piece


@dataclass(frozen=True)
class Part:
    """One file of a checkpoint: tensors by name, and facts that stand in the file's own header.

    A tensor is whole on every rank, or every rank has a Piece of it.
    """

    tensors: Mapping[str, Stored]
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """size of the file, without its header"""
        return sum(prod(t.shape) * t.dtype.itemsize for t in self.tensors.values())


Held = dict[str, dict[str, Piece]]
"""pieces by file and tensor"""


def write(
    folder: Path,
    parts: dict[str, Part],
    owner: dict[str, int],
    held: Held,
    world: World,
    group: dist.ProcessGroup | None,
) -> dict[str, tuple[int, str]]:
    """Write `parts` into `folder` and fsync them; returns size and sha256 of the files that this rank owns, by name.

    All ranks call it together. owner: the rank that writes a part. held: this rank's pieces. Raises OSError where a file
    cannot be written, but only once all pieces are sent and received, so that no other rank is left waiting.
    """
    files = {name: _File(folder / name, part) for name, part in parts.items() if owner[name] == world.rank}
    # Without empty pieces: all ranks gather this, and a large run has a million pairs of a rank and a tensor.
    given = {
        name: {key: (p.start, len(p.values)) for key, p in pieces.items() if len(p.values)}
        for name, pieces in held.items()
    }
    for name, key, holder, start, count in _transfers(world.gather(given, group), parts):
        if world.rank == holder == owner[name]:
            files[name].put(key, start, held[name][key].values)
        elif world.rank in (holder, owner[name]):
            for first in range(0, count, CHUNK):
                size = min(CHUNK, count - first)
                if world.rank == holder:
                    dist.send(held[name][key].values[first : first + size], owner[name], group)
                else:
                    chunk = torch.empty(size, dtype=parts[name].tensors[key].dtype)
                    dist.recv(chunk, holder, group)
                    files[name].put(key, start + first, chunk)
    return {name: file.close() for name, file in files.items()}


def _transfers(
    holdings: list[dict[str, dict[str, tuple[int, int]]]], parts: dict[str, Part]
) -> Iterator[tuple[str, str, int, int, int]]:
    """(file, tensor, rank that holds the piece, start, count) of all pieces, in the same order on every rank.

    All files grow side by side, so that many ranks send and many write at any time.
    """
    rows = [
        (place, name, key, holder, start, count)
        for holder, files in enumerate(holdings)
        for name, pieces in files.items()
        for place, (key, (start, count)) in enumerate(sorted(pieces.items()))
    ]
    given = sum(count for *_, count in rows)
    assert given == sum(prod(t.shape) for part in parts.values() for t in part.tensors.values())
    return (row[1:] for row in sorted(rows))


class _File:
    """A safetensors file whose tensors arrive in pieces, in any order. `close` raises the first OSError there was."""

    def __init__(self, path: Path, part: Part) -> None:
        self.path, self.part = path, part
        self._file: FileIO | None = None
        self._error: OSError | None = None
        header = _header(part, UNSEALED)
        self._spans = {name: (len(header) + a, len(header) + b) for name, (a, b) in _spans(part).items()}
        self._size = len(header) + part.nbytes
        self._write(0, header)

    def put(self, name: str, start: int, values: torch.Tensor) -> None:
        """Write `values`, the elements of tensor `name` from `start` on, to their place."""
        first, _ = self._spans[name]
        self._write(first + start * values.dtype.itemsize, values.view(torch.uint8).numpy().data)

    def close(self) -> tuple[int, str]:
        """Seal the file and fsync it; its size and sha256. Raises the first OSError there was."""
        if self.part.facts and self._error is None:
            # The seal is in the header, before the bytes that it covers; UNSEALED has kept its place.
            self._write(0, _header(self.part, sealed(self.part.facts, self._mapped())[SEAL]))
        if self._file is not None:
            with self._file as f:
                os.fsync(f.fileno())
        if self._error is not None:
            raise self._error
        return self._size, file_sha256(self.path)

    def _mapped(self) -> dict[str, torch.Tensor]:
        """The tensors in the file, mapped into memory."""
        data = torch.from_file(str(self.path), shared=False, size=self._size, dtype=torch.uint8)
        return {
            name: data[slice(*self._spans[name])].view(tensor.dtype).view(tensor.shape)
            for name, tensor in self.part.tensors.items()
        }

    def _write(self, at: int, given: bytes | memoryview) -> None:
        if self._error is not None:
            return
        try:
            if self._file is None:
                self._file = open(self.path, "xb", buffering=0)  # noqa: SIM115  open until `close`
            self._file.seek(at)
            rest = memoryview(given)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as e:
            self._error = e


def _header(part: Part, seal: str) -> bytes:
    """The beginning of a safetensors file: the header's length, then the header in JSON, padded to align the data."""
    entries: dict[str, object] = {}
    if part.facts:
        entries["__metadata__"] = {**part.facts, SEAL: seal}
    for name, span in _spans(part).items():
        tensor = part.tensors[name]
        entries[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": list(span),
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _spans(part: Part) -> dict[str, tuple[int, int]]:
    """(first byte, byte after the last) of each tensor, counted from the end of the header. Tensors of large types come
    first, so that all are aligned."""
    spans, end = {}, 0
    for name, tensor in sorted(part.tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        start, end = end, end + prod(tensor.shape) * tensor.dtype.itemsize
        spans[name] = (start, end)
    return spans
