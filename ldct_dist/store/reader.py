"""Opening a store and reading blocks of it.

Opening reads the catalogue alone, so it costs the same for ten cases and for ten thousand; arrays are
opened when they are first read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ldct_dist.ct.volume import Acquisition, Volume
from ldct_dist.errors import UserError
from ldct_dist.store import layout
from ldct_dist.store.catalogue import completed
from ldct_dist.store.record import WORD, CaseRecord, read_record, sha256
from ldct_dist.store.shards import DamagedError, Region, ShardedArray

OPEN_ARRAYS = 128  # arrays kept open: a file and an index each


@dataclass(frozen=True)
class Case:
    """One row of the catalogue; shape and chunk in voxels and spacing in mm, (z, y, x)."""

    name: str
    patient: str
    split: str
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    chunk: tuple[int, int, int]
    doses: tuple[str, ...]
    noise_hu: float | None


class Cases(Sequence[Case]):
    """The catalogue's rows, each made into a Case only when it is asked for."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def __len__(self) -> int:
        return self._table.num_rows

    @overload
    def __getitem__(self, i: int) -> Case: ...
    @overload
    def __getitem__(self, i: slice) -> list[Case]: ...
    def __getitem__(self, i: int | slice) -> Case | list[Case]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        row: dict[str, Any] = {}
        for name in Case.__dataclass_fields__:
            value = self._table[name][i].as_py()
            row[name] = tuple(value) if isinstance(value, list) else value
        return Case(**row)


class Store:
    """A store opened for reading; safe to share between threads.

    Raises UserError if `path` is not a store, or holds no catalogue yet.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        seal = layout.check_format(self.path)
        try:
            catalogue = (self.path / layout.CATALOGUE).read_bytes() if seal else None
        except FileNotFoundError:
            catalogue = None
        except OSError as e:
            raise UserError(f"{self.path}: {layout.CATALOGUE} cannot be read ({e})") from e
        if catalogue is None:
            raise UserError(f"{self.path}: no {layout.CATALOGUE}; its ingest did not finish: run it again")
        if sha256(catalogue) != seal:
            raise UserError(
                f"{self.path}: {layout.CATALOGUE} is damaged, or not the last one written; run ldct-dist ingest again"
            )
        # Not pq.read_table, whose threads, where a process ends soon after, now and then abort it (apache/arrow 34314).
        self.table = completed(pq.ParquetFile(pa.BufferReader(catalogue)).read(use_threads=False))
        self._refuse_paths()
        self.fingerprint: str = self.table.schema.metadata[b"fingerprint"].decode()
        self.cases = Cases(self.table)
        self.array = lru_cache(OPEN_ARRAYS)(self._open)

    @cached_property
    def splits(self) -> np.ndarray:
        """The split of each case."""
        return self.table["split"].to_numpy(zero_copy_only=False)

    def split(self, name: str) -> np.ndarray:
        """Indices of the cases in split `name`. Raises UserError if there are none."""
        indices = np.flatnonzero(self.splits == name)
        if not len(indices):
            there = ", ".join(sorted(set(self.splits))) or "none"
            raise UserError(
                f"{self.path}: no case in split {name!r}; its splits are: {there}; name one of them, or ingest again "
                f"with other shares (splits=) or with a patient named (split_of='{{PATIENT: {name}}}')"
            )
        return indices

    def having(self, dose: str) -> np.ndarray:
        """Indices of the cases that have `dose`."""
        doses = self.table["doses"].combine_chunks()
        return pc.list_parent_indices(doses).to_numpy()[pc.equal(pc.list_flatten(doses), dose)]

    def triples(self, column: str) -> np.ndarray:
        """(cases, 3) int64: `shape` or `chunk` of all cases."""
        return self.table[column].combine_chunks().flatten().to_numpy().reshape(-1, 3).astype(np.int64)

    def body(self, case: int) -> bytes:
        """Share of body in each chunk of a case: see `CaseRecord`."""
        return self.table["body"][case].as_py()

    def read(self, case: str, dose: str, region: Region, out: np.ndarray | None = None) -> np.ndarray:
        """int16 HU (z, y, x) of a region within the array's bounds, in `out` if that is given.

        Raises UserError naming the place if a byte on disk is not what was written.
        """
        if out is None:
            out = np.empty([s.stop - s.start for s in region], np.int16)
        where = f"{self.path}: case {case} at dose {dose}"
        try:
            self.array(self.path, case, dose).read(region, out)
        except DamagedError as e:
            raise UserError(
                f"{where} is damaged ({e}); delete {layout.CASES}/{case} there and ingest it again"
            ) from e
        except OSError as e:
            raise UserError(f"{where} cannot be read ({e})") from e
        return out

    def volume(self, case: str, dose: str) -> Volume:
        """The whole case at one dose, with its geometry. Raises UserError if there is no such case or dose."""
        record = self.record(case)
        if dose not in record.doses:
            raise UserError(f"{self.path}: case {case} has doses {', '.join(record.doses)}, not {dose}")
        hu = self.read(case, dose, tuple(slice(0, n) for n in record.shape))  # type: ignore[arg-type]
        acquisition = Acquisition(**record.acquisition)
        return Volume(hu, record.spacing, record.origin, record.direction, acquisition)

    def record(self, case: str) -> CaseRecord:
        """All that the case's own metadata says. Raises UserError as `read_record` does."""
        return read_record(self.path / layout.CASES / case)

    def replaced(self, case: str) -> bool:
        """Whether the case was ingested again after the catalogue that is open here was written. Ask after reading, since
        that may happen meanwhile. Raises UserError as `read_record` does."""
        return list(self.record(case).voxels) != self.table["voxels"][self.row(case)].as_py()

    def row(self, case: str) -> int:
        """Index of the case of that name, which must be there."""
        return pc.index(self.table["name"], case).as_py()

    def _refuse_paths(self) -> None:
        """A store may be anybody's, and its names become folders of what is written elsewhere: of `data.stage`'s copies,
        of which a damaged one is deleted. Raises UserError for a name that would lead out of there."""
        for column in (self.table["name"], pc.list_flatten(self.table["doses"])):
            foreign = pc.filter(column, pc.invert(pc.match_substring_regex(column, f"^{WORD}$")))
            if len(foreign):
                raise UserError(
                    f"{self.path}: a case or dose in {layout.CATALOGUE} is called {foreign[0].as_py()!r}, a name that no "
                    "ingest gives; do not use this store"
                )

    def _open(self, root: Path, name: str, dose: str) -> ShardedArray:
        """An array of the store, or of a copy of the store at another `root`."""
        case = self.cases[self.row(name)]
        return ShardedArray(root / layout.CASES / name / dose, case.shape, case.chunk)
