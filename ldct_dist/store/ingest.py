"""DICOM to store: in parallel over cases, each completely or not at all, safe to kill and to start again."""

from __future__ import annotations

import csv
import glob
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import Field

from ldct_dist.config import Config
from ldct_dist.ct.dose_config import DoseConfig
from ldct_dist.errors import UserError
from ldct_dist.files import real
from ldct_dist.store import layout, parts
from ldct_dist.store.pairing import Pair, PairingConfig, Refusal
from ldct_dist.store.privacy import default_key_path, key_id, keyed_hash, load_key
from ldct_dist.store.record import read_record
from ldct_dist.store.splits import check_named, check_shares, split_of_each
from ldct_dist.store.survey import shared_pairs
from ldct_dist.store.task import Task, task
from ldct_dist.store.workers import Workers

TYPICAL_RATIO = 1.6  # lz4 + bitshuffle on noisy CT


class IngestConfig(Config):
    """How a folder of DICOM is ingested."""

    dose: float = Field(0.25, ge=0.01, le=0.99)
    """dose fraction of the low-dose images, where their source does not say it"""
    pairing: PairingConfig = PairingConfig()
    simulation: DoseConfig = DoseConfig()
    seed: int = Field(0, ge=0)
    splits: dict[str, float] = Field(default_factory=lambda: {"train": 0.8, "val": 0.1, "test": 0.1})
    """share of the patients in each split, drawn by the keyed hash of the patient"""
    split_of: dict[str, str] = Field(default_factory=dict)
    """pattern of a patient (shell wildcards) to its split, for those that are not to be drawn"""
    key: Path | None = None
    """the secret that patients are hashed with; default: STORE.key beside the store"""
    workers: int | None = Field(None, gt=0, le=1024)
    """processes, of which no more are started than there are cases; default: one for each CPU this process may use"""


@dataclass(frozen=True)
class Survey:
    """What an ingest is going to write, known before it starts."""

    cases: int
    files: int
    bytes: int
    free: int
    """bytes free on the store's file system; a quota may leave fewer"""
    patients: int
    """of all cases, as PatientID or the manifest tells them apart"""
    empty: tuple[str, ...]
    """splits with a share above 0 into which no patient falls"""
    replaced: int
    """of the cases, those that are there, but from other files or with other settings"""


@dataclass
class IngestReport:
    written: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    """cases that were there whole, from the same source"""
    moved: list[str] = field(default_factory=list)
    """those of them that were in another split, of which only the record was changed"""
    rejected: list[Refusal] = field(default_factory=list)
    passed_over: list[Refusal] = field(default_factory=list)
    """the harmless, which no exit code tells of: scouts, reports, projections"""
    rejected_csv: Path | None = None
    """where the rejected and the passed over are listed, if there are any"""


def ingest(
    source: Path | str,
    out: Path | str,
    config: IngestConfig | None = None,
    *,
    part: tuple[int, int] = (0, 1),
    announce: Callable[[Survey], None] = lambda survey: None,
    progress: Callable[[str], None] = lambda case: None,
    notice: Callable[[str], None] = lambda line: None,
) -> IngestReport:
    """Write what `source`, a folder of DICOM or a manifest, holds into the store `out`, then its catalogue.

    part: (i, n) takes every n-th case, for the tasks of an array job, one of which reads the headers for all; once all
    parts are done, `finalise` writes the catalogue. `announce` hears what will be written before it is, `progress` each
    case that is done, `notice` whether headers are being read, or waited for. What is refused or passed over is listed in
    OUT.rejected.csv and does not stop the others. Works in processes of multiprocessing's fork server, which import the
    calling script: it needs an `if __name__ == "__main__"`.

    Raises UserError if nothing can be ingested at all, if a patient would stand in more than one split or a pattern
    of `split_of` decides for none, if cases of another simulated dose are there, and if `out` cannot be written; cases that
    are whole by then stay, and the next start goes on from there.
    """
    source, out, config = Path(source), Path(out), config or IngestConfig()
    check(source, out, config)
    with (
        Workers(config.workers or len(os.sched_getaffinity(0))) as workers,
        shared_pairs(out, part, source, config.pairing, workers.map, notice) as (pairs, refused),
        parts.unwritable_as_user_error(out),
    ):
        if not pairs:
            _write_rejected(out, part, refused)
            raise _nothing_ingested(source, refused)
        check_named(pairs, refused, config.splits, config.split_of)
        key = load_key(config.key or default_key_path(out))
        splits = split_of_each(pairs, key, config.splits, config.split_of)
        tasks = _tasks(out, pairs, splits, key, config, part)
        _refuse_another_dose(out, tasks)
        with parts.writing(out, part):
            layout.create(out)
            parts.begin(out, part)
            empty = tuple(s for s, share in config.splits.items() if share > 0 and s not in splits)
            patients = len({pair.patient for pair in pairs})
            report = _make(
                tasks, lambda todo: announce(_survey(out, todo, patients, empty)), workers, progress
            )
            if part[0] == 0:
                report.rejected[:0] = [r for r in refused if not r.harmless]
                report.passed_over = [r for r in refused if r.harmless]
            report.rejected_csv = _write_rejected(out, part, [*report.rejected, *report.passed_over])
            if part[1] > 1:
                parts.end(out, part, _list_hash(pairs, key))
            elif layout.list_cases(out):
                layout.finalise(out)
                parts.forget(out)
            else:
                parts.forget(out)
                raise _nothing_ingested(source, report.rejected)
    return report


def finalise(out: Path | str) -> int:
    """Write the catalogue of `out` once all parts of its ingest are done; how many cases it holds.

    Raises UserError if parts are missing or were made of different lists of cases, and as `layout.finalise` does, and if
    `out` cannot be written.
    """
    out = Path(out)
    layout.check_format(out)
    missing = parts.missing(out)
    if missing == [(0, 1)]:
        raise UserError(f"{out}: its ingest did not finish: run it again")
    if missing:
        named = ", ".join(f"{i}/{n}" for i, n in missing[:8]) + (", ..." if len(missing) > 8 else "")
        raise UserError(f"{out}: {len(missing)} part(s) of its ingest are not done: run --part {named} first")
    if not parts.agree(out):
        raise UserError(
            f"{out}: the source changed between the parts of its ingest, so a case may be in none of them: run all parts "
            "again; complete cases are kept"
        )
    with parts.unwritable_as_user_error(out), parts.writing(out, (0, 1)):
        if not layout.list_cases(out):
            raise UserError(f"{out}: no case in it; see {out.name}.rejected*.csv beside it for the reasons")
        count = layout.finalise(out)
        parts.forget(out)
    return count


def _make(
    tasks: Sequence[Task],
    announce: Callable[[Sequence[Task]], None],
    workers: Workers,
    progress: Callable[[str], None],
) -> IngestReport:
    """Make the cases that are not there yet, and move those that are in another split; a report of it."""
    records = [t.record for t in tasks]
    todo = [t for t, record in zip(tasks, records, strict=True) if record is None]
    # Large ones first: those made last are then short, and no process has to wait long for the others.
    todo.sort(key=lambda t: math.prod(t.pair.full.shape), reverse=True)
    announce(todo)
    report = IngestReport()
    for t, record in zip(tasks, records, strict=True):
        if record is not None:
            report.skipped.append(t.name)
            if record.split != t.split:
                t.move(record)
                report.moved.append(t.name)
    for done, refusal in workers.make(todo):
        if refusal is None:
            report.written.append(done.name)
        else:
            report.rejected.append(Refusal(done.pair.name or str(done.pair.full.place), refusal))
        progress(done.name)
    return report


def _tasks(
    out: Path,
    pairs: Sequence[Pair],
    splits: Sequence[str],
    key: bytes,
    config: IngestConfig,
    part: tuple[int, int],
) -> list[Task]:
    first, step = part
    return [
        task(
            out,
            pair,
            split,
            key,
            dose=config.dose,
            seed=config.seed,
            simulation=config.simulation,
            check=config.pairing.check,
            splits=config.splits,
        )
        for pair, split in list(zip(pairs, splits, strict=True))[first::step]
    ]


def _list_hash(pairs: Sequence[Pair], key: bytes) -> str:
    """Of the cases in their order, by which they are divided into parts."""
    series = (s for pair in pairs for s in (pair.full, pair.low))
    return keyed_hash(key, "parts", *("" if s is None else s.series_uid for s in series))


def _survey(out: Path, tasks: Sequence[Task], patients: int, empty: tuple[str, ...]) -> Survey:
    shapes = [t.pair.full.shape for t in tasks]
    # A case has one file for its record, and for each of its two doses one for the array's metadata, and its shards.
    files = sum(1 + 2 * (1 + layout.shard_count(shape)) for shape in shapes)
    size = round(2 * 2 * sum(map(math.prod, shapes)) / TYPICAL_RATIO)
    replaced = sum(t.found is not None for t in tasks)
    return Survey(len(tasks), files, size, shutil.disk_usage(out).free, patients, empty, replaced)


def _refuse_another_dose(out: Path, tasks: Sequence[Task]) -> None:
    """Raises UserError if cases of another simulated dose would be replaced: a run may be training on them."""
    for t in tasks:
        if dose := t.replaces_dose:
            raise UserError(
                f"{out}: its low dose is {dose}, simulated, and dose={t.dose:g} would replace it; give {t.dose:g} a store of "
                f"its own, or remove this one first"
            )


def check(source: Path, out: Path, config: IngestConfig) -> None:
    """Raises UserError for mistakes that can be found before any DICOM file is read. Writes nothing."""
    check_shares(config.splits, config.split_of)
    if not os.path.exists(source):  # Path.exists would raise PermissionError
        raise UserError(
            f"{source}: does not exist or may not be read; give the folder of the DICOM files, or a manifest"
        )
    if source.is_dir() and real(out).is_relative_to(real(source)):
        raise UserError(f"{out}: is the source or is in it; put the store outside {source}")
    with parts.unwritable_as_user_error(out):
        layout.check_place(out)
        _check_key(out, config.key or default_key_path(out))


def _check_key(out: Path, path: Path) -> None:
    """Raises UserError unless the key at `path` is the one of the cases that are there already, if any are."""
    cases = out / layout.CASES
    there = (p for p in cases.iterdir() if not p.name.startswith(".")) if cases.is_dir() else ()
    known = next((p for p in there if p.is_dir()), None)
    if known is None:
        return
    danger = "with another key, its patients would be taken for new ones"
    if not os.path.exists(path):
        raise UserError(
            f"{out}: its key is not at {path}, or may not be read there; put it back, or say where it is by key=: {danger}"
        )
    try:
        record = read_record(known)
    except UserError:  # damaged: it is ingested again, and `finalise` compares all keys
        return
    if record.key_id not in (None, key_id(load_key(path))):
        raise UserError(f"{out}: {path} is not its key; give the right file by key=: {danger}")


def _nothing_ingested(source: Path, refused: Sequence[Refusal]) -> UserError:
    return UserError(f"{source}: no series could be ingested; the first reason: {refused[0].reason}")


def _write_rejected(out: Path, part: tuple[int, int], rejected: Sequence[Refusal]) -> Path | None:
    """Write the list of what was refused or passed over; its path, None if nothing was.

    It is beside the store, not in it, and readable by its owner alone, like the key, since folder names may contain names
    of patients. Lists of an earlier ingest in another number of parts are deleted: no task would write them anew.
    """
    which = f"-{part[0]}-of-{part[1]}" if part[1] > 1 else ""
    path = out.with_name(f"{out.name}.rejected{which}.csv")
    for end in ("", "-[0-9]*-of-[0-9]*"):
        for listed in out.parent.glob(f"{glob.escape(out.name)}.rejected{end}.csv"):
            if listed == path or not listed.stem.endswith(f"-of-{part[1]}"):
                listed.unlink(missing_ok=True)
    if not rejected:
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    # surrogateescape writes file names that are not UTF-8 as they are.
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(fd, "w", newline="", encoding="utf-8", errors="surrogateescape") as f:
        rows = csv.writer(f)
        rows.writerow(["where", "reason", "outcome"])
        rows.writerows((r.where, r.reason, "passed over" if r.harmless else "refused") for r in rejected)
    return path
