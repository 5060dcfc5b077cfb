"""What a store holds, as tables for a person."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ldct_dist.files import size
from ldct_dist.store.layout import CASES
from ldct_dist.store.reader import Store

LOOKS_AT_ONCE = 16  # folders that are listed at the same time: on a shared file system each takes a while
FACTS = ["name", "patient", "split", "shape", "spacing", "doses", "noise_hu", "low_dose"]
USUAL_ORDER = ("train", "val", "test")

Row = dict[str, Any]


def rows(store: Store) -> list[Row]:
    """The catalogue's FACTS of each case, `low_dose` as in CaseRecord; `bytes`, the size of its voxels on disk, for
    which each of their files is looked at; and `voxel_bytes`, their size as int16. Sorted by split, then by name."""
    cases = store.table.select(FACTS).to_pylist()
    with ThreadPoolExecutor(LOOKS_AT_ONCE) as threads:
        sizes = threads.map(_bytes_in, (store.path / CASES / row["name"] for row in cases))
        for row, nbytes in zip(cases, sizes, strict=True):
            row |= {"bytes": nbytes, "voxel_bytes": 2 * prod(row["shape"]) * len(row["doses"])}
            row["low_dose"] = row["low_dose"] and json.loads(row["low_dose"])
    return sorted(cases, key=lambda row: (_order(row["split"]), row["name"]))


def summary(cases: Sequence[Row]) -> Table:
    """One column for all cases, and one a split."""
    splits = sorted({row["split"] for row in cases}, key=_order)
    columns = [list(cases), *([row for row in cases if row["split"] == split] for split in splits)]
    table = Table("", "all", *splits, box=SIMPLE_HEAD, pad_edge=False)
    for title, fact in _SUMMARY.items():
        table.add_row(title, *map(fact, columns))
    return table


def by_split(store: Store, named: Iterable[str] = ()) -> str:
    """One line: how many cases, and of how many patients, each split holds, those `named` even if none."""
    cases = list(zip(store.splits, store.table["patient"].to_pylist(), strict=True))
    cells = []
    for split in sorted({*named, *store.splits}, key=_order):
        patients = [patient for where, patient in cases if where == split]
        cells.append(f"{split} {len(patients):,} ({len(set(patients)):,})" if patients else f"{split} none")
    return f"cases (patients) by split: {', '.join(cells)}"


def listing(cases: Sequence[Row]) -> Table:
    """One row a case; with the names that ingest makes up, no wider than 80 columns."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=0)
    for title in _LISTING:
        table.add_column(title, overflow="fold", justify="right" if title in _NUMBERS else "left")
    for row in cases:
        table.add_row(*(fact(row) for fact in _LISTING.values()))
    return table


def _known_noise(cases: Iterable[Row]) -> list[float]:
    return [row["noise_hu"] for row in cases if row["noise_hu"] is not None]


def _span(values: Iterable[float], form: str) -> str:
    """The smallest and the largest, or the one that all are."""
    ends = [format(end, form) for end in (min(known), max(known))] if (known := list(values)) else ["unknown"]
    return " - ".join(dict.fromkeys(ends))


def _doses(cases: Sequence[Row]) -> str:
    return _counted((dose for row in cases for dose in row["doses"]), len(cases))


def _made(cases: Sequence[Row]) -> str:
    low = [row for row in cases if len(row["doses"]) > 1]
    return _counted(((row["low_dose"] or {"made": "unknown"})["made"] for row in low), len(low)) or "none"


def _simulated_with(cases: Iterable[Row], setting: str) -> list[Any]:
    """That setting of the DoseConfig of each case that an ingest simulated."""
    return [row["low_dose"]["config"][setting] for row in cases if "config" in (row["low_dose"] or ())]


def _counted(values: Iterable[str], of: int) -> str:
    """The values in reverse alphabetical order, each with its number of cases, unless all `of` them have it."""
    counts = sorted(Counter(values).items(), reverse=True)
    return ", ".join(value if count == of else f"{value} ({count:,})" for value, count in counts)


def _sum(cases: Sequence[Row], key: str) -> int:
    return sum(row[key] for row in cases)


_SUMMARY: dict[str, Callable[[list[Row]], str]] = {
    "cases": lambda r: f"{len(r):,}",
    "patients": lambda r: f"{len({row['patient'] for row in r}):,}",
    "doses": _doses,
    "low dose": _made,
    "simulated beam": lambda r: ", ".join(sorted(set(_simulated_with(r, "beam")))) or "-",
    "photons a ray, 1e6": lambda r: (
        _span((n / 1e6 for n in known), ".3g") if (known := _simulated_with(r, "photons")) else "-"
    ),
    "slices": lambda r: f"{sum(row['shape'][0] for row in r):,}",
    "slices a case": lambda r: _span((row["shape"][0] for row in r), "d"),
    "rows, columns": lambda r: _span((n for row in r for n in row["shape"][1:]), "d"),
    "slice spacing, mm": lambda r: _span((row["spacing"][0] for row in r), ".3g"),
    "pixel spacing, mm": lambda r: _span((mm for row in r for mm in row["spacing"][1:]), ".3g"),
    "noise, HU": lambda r: _span(_known_noise(r), ".1f"),
    "noise, median": lambda r: f"{median(known):.1f}" if (known := _known_noise(r)) else "unknown",
    "size on disk": lambda r: size(_sum(r, "bytes")),
    "compression": lambda r: f"{_sum(r, 'voxel_bytes') / max(1, _sum(r, 'bytes')):.2f} x",
}
_LISTING: dict[str, Callable[[Row], str]] = {
    "case": lambda row: row["name"],
    "split": lambda row: row["split"],
    "voxels": lambda row: " ".join(map(str, row["shape"])),
    "spacing, mm": lambda row: " ".join(f"{mm:.3g}" for mm in row["spacing"]),
    "doses": lambda row: " ".join(row["doses"]),
    "noise": lambda row: "-" if row["noise_hu"] is None else f"{row['noise_hu']:.1f}",
    "size": lambda row: size(row["bytes"]),
}
_NUMBERS = ("noise", "size")


def _bytes_in(case: Path) -> int:
    """The size of a case's shard files. Other files are left out: walking all folders takes ten times as long."""
    shards = (shards / number / "0/0" for shards in case.glob("*/c") for number in os.listdir(shards))
    return sum(shard.stat().st_size for shard in shards)


def _order(split: str) -> tuple[int, str]:
    return (USUAL_ORDER.index(split) if split in USUAL_ORDER else len(USUAL_ORDER)), split
