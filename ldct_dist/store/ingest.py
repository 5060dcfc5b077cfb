"""DICOM to store: in parallel over cases, each whole or not at all, safe to kill and to start again."""

from __future__ import annotations

import csv
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from pydantic import Field

from ldct_dist.config import Config
from ldct_dist.ct.dicom import read_series
from ldct_dist.ct.dose import DoseConfig, simulate_low_dose
from ldct_dist.errors import UserError
from ldct_dist.store import layout
from ldct_dist.store.pairing import Pair, PairingConfig, Refusal, find_pairs
from ldct_dist.store.privacy import default_key_path, keyed_hash, load_key

TYPICAL_RATIO = 1.6  # lz4 + bitshuffle on noisy CT


class IngestConfig(Config):
    """What becomes of a folder of DICOM."""

    dose: float = Field(0.25, gt=0, lt=1)
    """dose fraction of the low-dose images"""
    pairing: PairingConfig = PairingConfig()
    simulation: DoseConfig = DoseConfig()
    seed: int = 0
    splits: dict[str, float] = Field(default_factory=lambda: {"train": 0.8, "val": 0.1, "test": 0.1})
    """share of the patients in each split, drawn by the keyed hash of the patient"""
    split_of: dict[str, str] = Field(default_factory=dict)
    """pattern of a PatientID (shell wildcards) to its split, for those that are not to be drawn"""
    key: Path | None = None
    """the secret that patients are hashed with; default: STORE.key beside the store"""
    workers: int | None = Field(None, gt=0)
    """processes; default: one for each CPU this process may use"""


@dataclass(frozen=True)
class Survey:
    """What an ingest is going to write, told before it starts."""

    cases: int
    files: int
    bytes: int


@dataclass
class IngestReport:
    written: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """cases that were there whole, from the same source"""
    rejected: list[Refusal] = field(default_factory=list)


def ingest(
    source: Path | str,
    out: Path | str,
    config: IngestConfig | None = None,
    *,
    part: tuple[int, int] = (0, 1),
    announce: Callable[[Survey], None] = lambda survey: None,
    progress: Callable[[str], None] = lambda case: None,
) -> IngestReport:
    """Write the series below `source` into the store `out`, then its catalogue.

    part: (i, n) takes every n-th case, for the tasks of an array job. `announce` hears what will be written
    before it is, `progress` each case that is done. Refused series are listed in OUT.rejected.csv and do not
    stop the others. Raises UserError if nothing can be ingested at all.
    """
    source, out, config = Path(source), Path(out), config or IngestConfig()
    _check_shares(config)
    pairs, refused = find_pairs(source, config.pairing)
    key = load_key(config.key or default_key_path(out))
    layout.create(out)
    tasks = [_task(out, pair, key, config) for pair in pairs[part[0] :: part[1]]]
    report = IngestReport(rejected=refused if part[0] == 0 else [])
    _refuse_leaks(pairs, key, config)
    report.skipped = [task.name for task in tasks if _is_there(task)]
    todo = [task for task in tasks if task.name not in report.skipped]
    announce(_survey(todo))
    for task, error in _run(todo, config.workers):
        if error is None:
            report.written.append(task.name)
        else:
            report.rejected.append(Refusal(task.pair.full.name, error))
        progress(task.name)
    _write_rejected(out, report.rejected)
    if not layout.list_cases(out):
        first = report.rejected[0]
        raise UserError(f"{source}: no series could be ingested; the first reason: {first.reason}")
    if part[1] == 1:
        layout.finalise(out)
    return report


@dataclass(frozen=True)
class _Task:
    store: Path
    name: str
    pair: Pair
    patient: str
    split: str
    provenance: str
    seed: int
    config: IngestConfig


def _task(store: Path, pair: Pair, key: bytes, config: IngestConfig) -> _Task:
    identity = keyed_hash(key, "case", pair.full.series_uid, pair.low.series_uid if pair.low else "")
    made_of = [pair.full, *([pair.low] if pair.low else [])]
    sizes = [str(path.stat().st_size) for series in made_of for path in series.paths]
    how = config.model_dump_json(include={"dose", "simulation", "seed"})
    return _Task(
        store=store,
        name=pair.name or f"case-{identity[:12]}",
        pair=pair,
        patient=_patient(pair, key),
        split=_split(pair, key, config),
        provenance=keyed_hash(key, "provenance", *(s.series_uid for s in made_of), *sizes, how),
        seed=config.seed + int(identity[:8], 16),
        config=config,
    )


def _patient(pair: Pair, key: bytes) -> str:
    return keyed_hash(key, "patient", pair.full.patient_id)


def _split(pair: Pair, key: bytes, config: IngestConfig) -> str:
    if pair.split is not None:
        return pair.split
    for pattern, split in config.split_of.items():
        if fnmatchcase(pair.full.patient_id, pattern):
            return split
    u = int(keyed_hash(key, "split", pair.full.patient_id)[:13], 16) / 16**13
    for split, share in config.splits.items():
        u -= share
        if u < 0:
            return split
    return next(reversed(config.splits))  # u was within rounding of 1


def _refuse_leaks(pairs: list[Pair], key: bytes, config: IngestConfig) -> None:
    splits: dict[str, set[str]] = {}
    for pair in pairs:
        splits.setdefault(pair.full.patient_id, set()).add(_split(pair, key, config))
    leaks = [p for p, s in splits.items() if len(s) > 1]
    if leaks:
        raise UserError(
            f"{len(leaks)} patient(s) would stand in more than one split: give all series of a patient one split"
        )


def _is_there(task: _Task) -> bool:
    case = task.store / layout.CASES / task.name
    return case.exists() and layout.read_record(case).provenance == task.provenance


def _run(tasks: list[_Task], workers: int | None) -> Iterator[tuple[_Task, str | None]]:
    workers = min(workers or len(os.sched_getaffinity(0)), max(1, len(tasks)))
    # Not fork: the parent has threads (torch, tensorstore) that a forked child would wait for for ever.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        running = {pool.submit(_write, task): task for task in tasks}
        for future in as_completed(running):
            yield running[future], future.result()


def _write(task: _Task) -> str | None:
    """Make one case; None, or why it was refused."""
    try:
        full = read_series(task.pair.full)
        if task.pair.low is not None:
            low = read_series(task.pair.low)
        else:
            low = simulate_low_dose(full, task.config.dose, task.seed, task.config.simulation)
        old = task.store / layout.CASES / task.name
        if old.exists():
            shutil.rmtree(old)  # made from something else, by an earlier ingest
        layout.write_case(
            task.store,
            task.name,
            {1.0: full, task.config.dose: low},
            patient=task.patient,
            split=task.split,
            provenance=task.provenance,
        )
    except UserError as e:
        return str(e)
    return None


def _survey(tasks: list[_Task]) -> Survey:
    voxels = sum(z * y * x for z, y, x in (t.pair.full.shape for t in tasks))
    # a case is its record, and for each dose the array's metadata and one shard
    return Survey(len(tasks), 5 * len(tasks), round(2 * 2 * voxels / TYPICAL_RATIO))


def _check_shares(config: IngestConfig) -> None:
    total = sum(config.splits.values())
    if min(config.splits.values(), default=0.0) < 0 or abs(total - 1) > 1e-6:
        raise UserError(f"splits: the shares {config.splits} add up to {total:g}; they must add up to 1")


def _write_rejected(out: Path, rejected: list[Refusal]) -> None:
    """Beside the store, not in it: the folders' names may name patients."""
    path = out.with_name(f"{out.name}.rejected.csv")
    if not rejected:
        path.unlink(missing_ok=True)
        return
    with open(path, "w", newline="") as f:
        rows = csv.writer(f)
        rows.writerow(["where", "reason"])
        rows.writerows((r.where, r.reason) for r in rejected)
