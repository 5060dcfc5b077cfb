"""Verbs about DICOM and stores."""

from __future__ import annotations

import os
import shlex
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ldct_dist.cli.common import app, console, notice, part_of, progress
from ldct_dist.errors import UserError
from ldct_dist.files import refuse_inside, refuse_taken, refuse_unwritable, size

if TYPE_CHECKING:
    from ldct_dist.store.ingest import IngestReport, Survey

_SHOWN = 20
"""series that ingest names of those refused, and of those passed over; a list beside the store has all"""


@app.command()
def ingest(
    source: Annotated[
        Path, typer.Argument(help="Folder with the DICOM files, nested in any way, or a manifest (CSV)")
    ],
    store: Annotated[Path, typer.Argument(help="The store to write; one that is there already is continued")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="Settings, such as pairing.kernel='B30*' split_of='{L067: test}'"
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file with such settings")] = None,
    part: Annotated[
        str,
        typer.Option(help="i/n, for array jobs: only every n-th case, starting at case i (counted from 0)"),
    ] = "0/1",
) -> None:
    """Read DICOM into a Zarr store. Series that cannot be used are listed; the others go in all the same.

    Exit codes: 0 all that is CT went in; 1 some of it was refused, see STORE.rejected.csv; 2 a mistake, read the error.
    docs/your_data.md has all settings.

    Example: ldct-dist ingest /data/dicom /scratch/ct.zarr dose=0.25 splits='{train: 0.8, val: 0.1, test: 0.1}'
    """
    from ldct_dist.store.processes import start_server

    start_server()  # first, so that its imports and those below, of half a second each, go on at the same time

    from ldct_dist import config as configs
    from ldct_dist.store.ingest import IngestConfig
    from ldct_dist.store.ingest import ingest as run

    settings = configs.read(IngestConfig, config, overrides or [])
    foreseen: set[str] = set()
    with progress() as bar:
        task = bar.add_task("reading headers", total=None)

        def log(line: str) -> None:
            if not console.is_terminal:  # a log has no bar, and millions of headers take an hour
                console.print(line)

        def announce(survey: Survey) -> None:
            _print_survey(survey)
            foreseen.update(survey.empty)
            bar.update(task, description="ingest", total=survey.cases)

        def advance(_: str) -> None:
            bar.advance(task)
            done, total = int(bar.tasks[task].completed), int(bar.tasks[task].total or 1)
            if 10 * done // total > 10 * (done - 1) // total:  # each tenth
                log(f"cases done: {done} of {total}")

        report = run(
            source,
            store,
            settings,
            part=part_of(part),
            announce=announce,
            progress=advance,
            notice=log,
        )
    _print_report(report, store)
    if part == "0/1":
        _print_splits(store, [name for name, share in settings.splits.items() if share > 0], foreseen)
    if report.rejected:
        raise typer.Exit(1)


def _print_survey(survey: Survey) -> None:
    console.print(
        f"cases to write: {survey.cases} (in all {survey.files} files and about {size(survey.bytes)}; the disk has "
        f"{size(survey.free)} free, a quota may leave less)"
    )
    if survey.bytes > survey.free:
        notice(
            "warning: the disk will probably fill up before the end; cases that are finished by then are kept"
        )
    if survey.replaced:
        notice(
            f"warning: {survey.replaced} of these cases are there, but from other files or with other settings; they are "
            "replaced"
        )
    if survey.empty:
        _print_empty(survey.empty, survey.patients)


def _print_empty(splits: Sequence[str], patients: int) -> None:
    none = f"warning: split {' and '.join(splits)} will hold no patient"
    if patients == 1:  # anonymised exports may call all of them the same
        notice(
            f"{none}: all cases count as one patient's, by their PatientID or the manifest; if there are more, list the "
            "cases in a manifest (a CSV with the columns case, patient, full, low) and ingest that into a new store"
        )
    else:
        notice(
            f"{none} of the {patients}; name patients (split_of='{{PATIENT: {splits[-1]}}}'), or give it no share "
            "(splits=), and run ingest again, which moves finished cases quickly"
        )


def _print_report(report: IngestReport, store: Path) -> None:
    moved = f", {len(report.moved)} of them moved to another split" if report.moved else ""
    over = f", {len(report.passed_over)} series passed over" if report.passed_over else ""
    console.print(
        f"cases: {len(report.written)} written, {len(report.skipped)} there already{moved}, "
        f"{len(report.rejected)} refused{over} -> {store}",
    )
    for refusal in report.rejected[:_SHOWN]:
        console.print(f"  refused: {refusal.reason}")
    for refusal in report.passed_over[:_SHOWN]:
        console.print(f"  passed over: {refusal.reason}")
    if report.rejected_csv:
        console.print(f"  all of these: {report.rejected_csv}")


def _print_splits(store: Path, named: Sequence[str] = (), foreseen: Collection[str] = ()) -> None:
    """named: splits that are to hold patients; foreseen: those of them that the user has heard will not."""
    from ldct_dist.store.reader import Store
    from ldct_dist.store.summary import by_split

    opened = Store(store)
    console.print(by_split(opened, named))
    lost = [split for split in named if split not in opened.splits and split not in foreseen]
    if lost:
        notice(
            f"warning: split {' and '.join(lost)} holds no patient, since those drawn for it were refused; mend these, or "
            f"name others (split_of='{{PATIENT: {lost[-1]}}}'), and run ingest again, which keeps finished cases"
        )


@app.command()
def finalise(
    store: Annotated[Path, typer.Argument(help="A store whose parts have all been written")],
) -> None:
    """Write a store's catalogue, after all tasks of an array job have done their --part of the ingest.

    Example: ldct-dist finalise /scratch/ct.zarr
    """
    from ldct_dist.store.ingest import finalise as run

    console.print(f"cases: {run(store)} -> {store}")
    _print_splits(store)


@app.command()
def info(
    store: Annotated[Path, typer.Argument(help="A store")],
    cases: Annotated[bool, typer.Option("--cases", help="Also list every case")] = False,
) -> None:
    """Show what a store holds: cases, doses, spacing, noise, splits, size.

    Example: ldct-dist info /scratch/ct.zarr
    """
    from ldct_dist.store.reader import Store
    from ldct_dist.store.summary import listing, rows, summary

    opened = Store(store)
    with console.status("adding up files"):
        found = rows(opened)
    console.print(f"{store}, fingerprint {opened.fingerprint[:16]}")
    console.print(summary(found))
    console.print("noise: standard deviation in soft tissue at full dose, HU; spacing in mm")
    if cases:
        console.print(listing(found))
    else:
        console.print(f"each case: ldct-dist info {shlex.quote(str(store))} --cases")


@app.command()
def simulate(
    source: Annotated[
        Path, typer.Argument(help="Folder with one full-dose DICOM series, or an enhanced CT file")
    ],
    out: Annotated[Path, typer.Argument(help="New folder for the low-dose series")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Settings of the simulated scanner, such as photons=2e5 cutoff_per_mm=0.8",
        ),
    ] = None,
    dose: Annotated[
        float, typer.Option(help="Dose of the new series, as a fraction of the full dose")
    ] = 0.25,
    seed: Annotated[
        int,
        typer.Option(
            min=0, help="Seed of the noise; different series get different noise from the same seed"
        ),
    ] = 0,
) -> None:
    """Simulate a DICOM series at a lower dose.

    Example: ldct-dist simulate full/ quarter/ --dose 0.25
    """
    from ldct_dist import config as configs
    from ldct_dist.ct.derived import write_simulated
    from ldct_dist.ct.dicom import one_series, read_series
    from ldct_dist.ct.dose import simulate_low_dose
    from ldct_dist.ct.dose_config import DoseConfig, seed_of

    scanner = configs.read(DoseConfig, None, overrides or [])
    refuse_inside(out, source)
    refuse_taken(out)
    refuse_unwritable(out.absolute().parent)
    series = one_series(source, notice)
    with console.status("simulating"):
        low = simulate_low_dose(read_series(series), dose, seed_of(series.series_uid, seed), scanner)
    files = write_simulated(series, low.hu, out, dose)
    console.print(f"{len(files)} slices -> {out}")


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="A store, the folder of a run, or a weights file")],
) -> None:
    """Check every byte of a store, a run's checkpoints or a weights file against the checksums written with it.

    Lists each fault, with its case and array. Exit code 1 if there are any.

    Example: ldct-dist verify /scratch/ct.zarr
    """
    from ldct_dist.checkpoint.load import verify_run
    from ldct_dist.models.weights import verify_weights
    from ldct_dist.store.verify import verify as verify_store

    if os.path.isfile(path):  # Path.is_file would raise PermissionError
        faults = verify_weights(path)
    elif os.path.isdir(path / "checkpoints"):
        faults = verify_run(path / "checkpoints")
    elif os.path.isdir(path / "cases") or os.path.exists(path / "zarr.json"):
        with progress() as bar:
            task = bar.add_task("verify", total=None)
            faults = verify_store(path, lambda done, total: bar.update(task, completed=done, total=total))
    else:
        raise UserError(
            f"{path}: neither a store (zarr.json), a run (checkpoints/) nor a weights file that may be read"
        )
    for fault in faults:
        console.print(fault)
    if faults:
        raise typer.Exit(1)
    console.print(f"{path}: every byte is as it was written")
