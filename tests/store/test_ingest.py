from __future__ import annotations

import csv
import errno
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread

from ldct_dist.ct.dicom import one_series
from ldct_dist.ct.dose import simulate_low_dose
from ldct_dist.ct.dose_config import DoseConfig, seed_of
from ldct_dist.errors import UserError
from ldct_dist.store import layout, workers
from ldct_dist.store.ingest import finalise, ingest
from ldct_dist.store.pairing import PairingConfig, find_pairs
from ldct_dist.store.parts import writing
from ldct_dist.store.reader import Store
from ldct_dist.store.record import read_record
from ldct_dist.store.task import task
from ldct_dist.store.verify import verify
from sources import CONFIG, QUICK, SHAPE, anatomy, write_pair, write_patients
from synthetic_dicom import Options, write_series


@pytest.fixture
def source(tmp_path):
    return write_patients(tmp_path / "in", 3)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "ct.zarr"


def content(store: Path) -> dict[str, bytes]:
    return {str(p.relative_to(store)): p.read_bytes() for p in sorted(store.rglob("*")) if p.is_file()}


def test_every_series_becomes_a_verified_case_with_its_simulated_low_dose(source, out, threads):
    surveys, told = [], []
    report = ingest(source, out, CONFIG, announce=surveys.append, progress=told.append)
    assert (len(report.written), report.skipped, report.rejected) == (3, [], [])
    assert sorted(told) == sorted(report.written)
    assert (surveys[0].cases, surveys[0].files) == (
        3,
        sum(p.is_file() for p in (out / "cases").glob("*/**/*")),
    )
    store = Store(out)
    full = {store.volume(c.name, "1.00").hu.tobytes() for c in store.cases}
    assert full == {anatomy(i).tobytes() for i in range(3)}
    for case in store.cases:
        low, high = store.volume(case.name, "0.25"), store.volume(case.name, "1.00")
        assert (low.spacing, low.origin) == (high.spacing, high.origin)
        assert 1 < np.std(low.hu.astype(float) - high.hu) < 500
    assert verify(out) == []


def test_a_case_says_how_its_low_dose_was_made(tmp_path, out, threads):
    """With the config in the record, the simulation can be had again, bit for bit."""
    write_series(tmp_path / "in", anatomy(0, (4, 96, 96), noise=12.0), Options())
    simulation = DoseConfig(views=32, columns=64)
    ingest(tmp_path / "in", out, CONFIG.model_copy(update={"simulation": simulation}))
    store = Store(out)
    record = store.record(store.cases[0].name)
    assert record.low_dose is not None
    assert record.low_dose["made"] == "simulated"
    config = DoseConfig(**record.low_dose["config"])
    assert (config.views, config.columns) == (32, 64)
    assert config.photons is not None
    assert config.cutoff_per_mm is not None
    seed = seed_of(one_series(tmp_path / "in").series_uid, 0)
    again = simulate_low_dose(store.volume(record.name, "1.00"), 0.25, seed, config)
    assert np.array_equal(again.hu, store.volume(record.name, "0.25").hu)
    assert verify(out) == []


def test_a_pair_says_that_its_low_dose_was_acquired(tmp_path, out, threads):
    write_pair(tmp_path / "in/full_dose/L067", tmp_path / "in/quarter_dose/L067", Options(patient="L067"))
    ingest(tmp_path / "in", out, CONFIG)
    (case,) = Store(out).cases
    assert Store(out).record(case.name).low_dose == {"made": "acquired"}


def test_the_measured_noise_is_that_of_the_full_dose(tmp_path, out, threads):
    write_series(tmp_path / "in", anatomy(0, (6, 96, 96), noise=12.0), Options())
    ingest(tmp_path / "in", out, CONFIG)
    assert Store(out).cases[0].noise_hu == pytest.approx(12, rel=0.15)


def test_a_second_ingest_writes_nothing(source, out, threads):
    first = ingest(source, out, CONFIG)
    before = content(out)
    again = ingest(source, out, CONFIG)
    assert (again.written, sorted(again.skipped)) == ([], sorted(first.written))
    assert content(out) == before


def test_a_changed_source_is_ingested_again_and_nothing_else(source, out, threads):
    ingest(source, out, CONFIG)
    changed = source / "p1/slice-002.dcm"
    ds = dcmread(changed)
    ds.PixelData = bytes(len(ds.PixelData))  # the same size: -1024 HU all over
    ds.save_as(changed)
    report = ingest(source, out, CONFIG)
    assert (len(report.written), len(report.skipped)) == (1, 2)
    assert (Store(out).volume(report.written[0], "1.00").hu[2] == -1024).all()
    assert verify(out) == []


def test_other_settings_are_another_case(source, out, threads):
    ingest(source, out, CONFIG)
    report = ingest(source, out, CONFIG.model_copy(update={"seed": 1}))
    assert len(report.written) == 3


def test_another_split_makes_no_case_again(source, out, tmp_path, threads):
    """And leaves the store that an ingest with this split from the first would have made."""
    config = CONFIG.model_copy(update={"key": tmp_path / "key", "split_of": {"*": "train"}})
    ingest(source, out, config)
    arrays = {path: path.stat().st_ino for path in (out / "cases").glob("*/*/**/*")}
    changed = config.model_copy(update={"split_of": {"P001": "test", "*": "train"}})
    report = ingest(source, out, changed)
    assert (report.written, len(report.skipped), len(report.moved)) == ([], 3, 1)
    assert sorted(Store(out).splits) == ["test", "train", "train"]
    assert {path: path.stat().st_ino for path in (out / "cases").glob("*/*/**/*")} == arrays
    assert verify(out) == []
    ingest(source, tmp_path / "new.zarr", changed)
    assert content(out) == content(tmp_path / "new.zarr")
    assert not ingest(source, out, changed).moved


def test_the_noise_does_not_depend_on_the_secret(source, tmp_path, threads):
    for name in ("a", "b"):
        ingest(source, tmp_path / name, CONFIG)
    voxels = [
        {s.read(c.name, "0.25", tuple(map(slice, [0, 0, 0], SHAPE))).tobytes() for c in s.cases}
        for s in (Store(tmp_path / "a"), Store(tmp_path / "b"))
    ]
    assert voxels[0] == voxels[1]


def test_the_parts_of_an_array_job_make_the_store_that_one_ingest_makes(source, tmp_path, threads):
    config = CONFIG.model_copy(update={"key": tmp_path / "key"})
    ingest(source, tmp_path / "one", config)
    for i in (1, 0):
        ingest(source, tmp_path / "parts", config, part=(i, 2))
    with pytest.raises(UserError, match="did not finish"):
        Store(tmp_path / "parts")
    assert finalise(tmp_path / "parts") == 3
    assert content(tmp_path / "parts") == content(tmp_path / "one")


def test_finalise_names_the_parts_that_are_missing(source, out, threads):
    ingest(source, out, CONFIG, part=(2, 3))
    with pytest.raises(UserError, match=r"2 part\(s\) of its ingest are not done: run --part 0/3, 1/3 first"):
        finalise(out)
    ingest(source, out, CONFIG, part=(0, 2))  # thought better of: an array of two tasks
    with pytest.raises(UserError, match=r"1 part\(s\) .* run --part 1/2 first"):
        finalise(out)
    ingest(source, out, CONFIG, part=(1, 2))
    assert finalise(out) == 3
    assert finalise(out) == 3
    assert not out.with_name("ct.zarr.parts").exists()


@pytest.mark.parametrize("part", [(0, 1), (1, 2)])
def test_finalise_makes_no_store_of_an_ingest_that_was_cut_off(source, out, threads, part):
    """Nor of an array of which no task came to its end."""

    def interrupt(case: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(source, out, CONFIG, part=part, progress=interrupt)
    assert layout.list_cases(out)
    with pytest.raises(UserError, match=r"did not finish: run it again|run --part 0/2, 1/2 first"):
        finalise(out)
    ingest(source, out, CONFIG)
    assert finalise(out) == 3


def test_two_ingests_do_not_write_one_store_at_once(source, out, threads):
    with writing(out, (0, 1)), pytest.raises(UserError, match="another ingest is writing it; wait"):
        ingest(source, out, CONFIG)
    with writing(out, (0, 2)):
        ingest(source, out, CONFIG, part=(1, 2))
        with pytest.raises(UserError, match="another ingest is writing it"):
            ingest(source, out, CONFIG)
    assert ingest(source, out, CONFIG).skipped


def test_refused_series_are_listed_and_stop_no_other(source, out, threads):
    write_series(source / "gap", anatomy(), Options(patient="G"))
    (source / "gap/slice-003.dcm").unlink()
    write_series(source / "cut", anatomy(), Options(patient="C"))
    whole = (source / "cut/slice-004.dcm").read_bytes()
    (source / "cut/slice-004.dcm").write_bytes(whole[:-900])
    report = ingest(source, out, CONFIG)
    assert (len(report.written), report.rejected_csv) == (3, out.with_name("ct.zarr.rejected.csv"))
    with open(report.rejected_csv, newline="") as f:
        rows = list(csv.DictReader(f))
    assert ["1 missing slice(s)" in rows[0]["reason"], "slice-004.dcm" in rows[1]["reason"]] == [True, True]
    assert rows[1]["where"] == str(source / "cut")
    assert len(Store(out).cases) == 3

    for broken in ("gap", "cut"):
        for path in (source / broken).iterdir():
            path.unlink()
    assert ingest(source, out, CONFIG).rejected_csv is None
    assert not out.with_name("ct.zarr.rejected.csv").exists()


def test_a_source_of_which_nothing_can_be_used_says_the_first_reason(tmp_path, out, threads):
    write_series(tmp_path / "in", anatomy(), Options(tags={"Modality": "MR"}))
    with pytest.raises(UserError, match=r"no series could be ingested; the first reason: .*not CT"):
        ingest(tmp_path / "in", out, CONFIG)
    assert {path.name for path in tmp_path.iterdir()} == {"in", "ct.zarr.rejected.csv"}
    with pytest.raises(UserError, match="no such file or folder"):
        ingest(tmp_path / "nowhere", out, CONFIG)


def test_what_is_no_store_is_left_alone(source, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.txt").write_text("")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="notes: exists and is not a store"):
        ingest(source, tmp_path / "notes", CONFIG)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("place", ["in", "in/deep/ct.zarr", "in/../in/ct.zarr"])
def test_the_store_does_not_go_into_its_source(source, tmp_path, place):
    before = sorted(source.rglob("*"))
    with pytest.raises(UserError, match="is the source or lies in it"):
        ingest(source, tmp_path / place, CONFIG)
    assert sorted(source.rglob("*")) == before


def test_a_place_that_cannot_be_written_is_said(source, tmp_path, threads):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=r"file/ct\.zarr: cannot be written \(.*\); make room or choose another"
    ):
        ingest(source, tmp_path / "file/ct.zarr", CONFIG)


def test_a_full_disk_is_one_line_and_whole_cases_stay(source, out, threads, monkeypatch):
    synced = []

    def sync(root: Path) -> None:
        synced.append(root)
        if len(synced) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(layout, "_sync_tree", sync)
    with pytest.raises(
        UserError, match=r"ct\.zarr: cannot be written \(No space left on device\); make room"
    ):
        ingest(source, out, CONFIG.model_copy(update={"workers": 1}))
    assert len(layout.list_cases(out)) == 1
    assert not list((out / "cases").glob(f"{layout.TEMPORARY}*"))


class Deadly:
    """Ends the process that unpickles it, as a kernel short of memory would."""

    def __reduce__(self):
        return os._exit, (9,)


def test_a_killed_worker_is_refused_and_takes_no_other_case_along(tmp_path, out, own_server):
    pairs, _ = find_pairs(write_patients(tmp_path / "in", 2), PairingConfig())
    layout.create(out)
    settings = {"dose": 0.25, "seed": 0, "simulation": QUICK}
    deadly, fine = (
        task(out, p, "train", b"key", check=c, **settings)
        for p, c in zip(pairs, [Deadly(), None], strict=True)
    )
    with workers.Workers(2) as processes:
        results = {t.name: refusal for t, refusal in processes.make([deadly, fine])}
    assert results[fine.name] is None
    assert "its process was killed, most likely for want of memory" in results[deadly.name]
    assert layout.list_cases(out) == [fine.name]


def test_a_worker_killed_over_headers_is_one_line(own_server):
    """Time and again: a process that starts while another one is killed was once waited for without end."""
    for _ in range(30):
        with (
            workers.Workers(2) as processes,
            pytest.raises(UserError, match="headers were read: its process was"),
        ):
            list(processes.map(eval, ["__import__('os')._exit(9)", *"12345"]))


ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(str(Path(__file__).parents[i]) for i in (1, 2)),
    "OMP_NUM_THREADS": "1",
}
PROGRAM = """
import sys
from sources import CONFIG
from ldct_dist.store.ingest import ingest
if __name__ == "__main__":
    ingest(sys.argv[1], sys.argv[2], CONFIG)
"""


@pytest.fixture
def unbroken(tmp_path, out, monkeypatch) -> tuple[Path, Path, Path]:
    """Eight patients, a program that ingests, and their store made without a break; here, in threads of this process."""
    source, program, store = (tmp_path / name for name in ("in", "program.py", "reference.zarr"))
    write_patients(source, 8)
    program.write_text(PROGRAM)
    monkeypatch.setattr(workers, "pool", ThreadPoolExecutor)
    ingest(source, store, CONFIG)
    out.with_name("ct.zarr.key").write_text(store.with_name("reference.zarr.key").read_text())
    return source, program, store


def test_killed_and_started_again_it_makes_the_same_store(out, unbroken):
    """SIGKILL to the parent alone: its workers must end by themselves, and leave nothing that stays."""
    source, program, reference = unbroken
    kill_when(lambda: len(whole_cases(out)) >= 3, program, source, out)
    assert len(whole_cases(out)) < 8, "it was done before it was killed"
    (out / "cases" / f"{layout.TEMPORARY}killed").mkdir()
    report = ingest(source, out, CONFIG)
    assert len(report.skipped) >= 3
    assert content(out) == content(reference)
    assert not list((out / "cases").glob(".*"))


def test_killed_again_and_again_at_any_instant_it_makes_the_same_store(out, unbroken):
    """SIGKILL to all its processes at once, as a node does that loses power; instants count in files and folders
    made, so that they are the same on fast and slow machines."""
    source, program, reference = unbroken
    draw, kills = random.Random(1), 0
    for _ in range(3):
        wanted = made(out) + draw.randrange(1, 45)
        kills += killed_at(lambda wanted=wanted: made(out) >= wanted, program, source, out)
        for name in whole_cases(out):
            read_record(out / "cases" / name)
    ingest(source, out, CONFIG)
    assert kills >= 2
    assert content(out) == content(reference)
    assert not list((out / "cases").glob(".*"))


def made(folder: Path) -> int:
    """Files and folders below it, as far as they do not go while they are counted."""
    return sum(len(folders) + len(files) for _, folders, files in os.walk(folder))


def killed_at(reached, program: Path, *arguments: Path) -> bool:
    """Start the program in a group of its own and kill that; whether it had not ended before."""
    run = subprocess.Popen([sys.executable, program, *arguments], env=ENVIRONMENT, start_new_session=True)
    while not reached() and run.poll() is None:
        time.sleep(0.001)
    early = run.poll() is None
    with suppress(ProcessLookupError):
        os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    return early


def whole_cases(out: Path) -> list[str]:
    return layout.list_cases(out) if (out / "cases").exists() else []


def kill_when(reached, program: Path, *arguments: Path) -> None:
    run = subprocess.Popen([sys.executable, program, *arguments], env=ENVIRONMENT)
    while not reached():
        assert run.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    started = descendants(str(run.pid))
    run.send_signal(signal.SIGKILL)
    run.wait()
    deadline = time.monotonic() + 20
    while any(is_alive(pid) for pid in started):
        assert time.monotonic() < deadline, "its workers outlive it"
        time.sleep(0.01)


def descendants(pid: str) -> list[str]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return children + [pid for child in children for pid in descendants(child)]


def is_alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
