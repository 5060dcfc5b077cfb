"""The headers of a source, read by one task of an array job for all of them."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ldct_dist.ct import headers
from ldct_dist.errors import UserError
from ldct_dist.store import survey
from ldct_dist.store.ingest import IngestConfig, finalise, ingest
from ldct_dist.store.pairing import PairingConfig
from ldct_dist.store.reader import Store
from sources import SHAPE, anatomy, content, write_pair
from synthetic_dicom import Options, write_series

FILES = 2 * SHAPE[0]  # of one patient
CONFIG = IngestConfig(workers=2)
HERE = Path(__file__)


def write_patient(source: Path, patient: str) -> None:
    """A pair in the folders of Mayo 2016: a task needs no torch for it, which takes seconds to import."""
    full, low = (source / f"{dose}_1mm/{patient}/{dose}_1mm" for dose in ("full", "quarter"))
    write_pair(full, low, Options(patient=patient))


def remove_patient(source: Path, patient: str) -> None:
    for dose in ("full", "quarter"):
        shutil.rmtree(source / f"{dose}_1mm/{patient}")


@pytest.fixture
def source(tmp_path) -> Path:
    for i in range(4):
        write_patient(tmp_path / "in", f"L00{i}")
    return tmp_path / "in"


@pytest.fixture
def listed(out) -> Path:
    return out.with_name("ct.zarr.parts") / "survey.json.gz"


@pytest.fixture
def read(monkeypatch, threads) -> list[Path]:
    """The files whose headers are read in this process, which is a task of the array job 42."""
    paths: list[Path] = []

    def counted(path: Path) -> headers.Header | None:
        paths.append(path)
        return as_it_is(path)

    as_it_is = headers.read_header
    monkeypatch.setattr(headers, "read_header", counted)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "42")
    return paths


PROGRAM = """
import sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from ldct_dist.ct import headers
from ldct_dist.errors import UserError
from ldct_dist.store import workers
from ldct_dist.store.ingest import IngestConfig, ingest
from ldct_dist.store.pairing import PairingConfig

source, out, part, signs, hold, *kernel = sys.argv[1:]
as_it_is = headers.read_header

def held(path):
    with open(Path(signs, "read"), "a") as f:
        f.write(f"{part}\\n")
    while not Path(signs, hold).exists():
        time.sleep(0.005)
    return as_it_is(path)

def notice(line):
    print(line, flush=True)
    if line.startswith("waiting"):
        Path(signs, "waiting").touch()

headers.read_header = held
workers.pool = ThreadPoolExecutor
config = IngestConfig(workers=2, pairing=PairingConfig(kernel=kernel[0] if kernel else None))
try:
    ingest(source, out, config, part=(int(part), 2), notice=notice)
except UserError as e:
    sys.exit(f"refused: {e}")
"""


class Tasks:
    """Tasks of an array job in processes of their own. A header is read only once the sign `hold` is there; a task that
    waits gives the sign "waiting"."""

    def __init__(self, source: Path, out: Path, signs: Path) -> None:
        self.source, self.out, self.signs = source, out, signs
        self.started: list[subprocess.Popen] = []
        signs.mkdir()
        (signs / "program.py").write_text(PROGRAM)

    def start(self, part: int, *, hold: str, kernel: tuple[str, ...] = ()) -> subprocess.Popen:
        paths = os.pathsep.join(str(HERE.parents[i]) for i in (1, 2))
        run = subprocess.Popen(
            [
                sys.executable,
                self.signs / "program.py",
                self.source,
                self.out,
                str(part),
                self.signs,
                hold,
                *kernel,
            ],
            env={**os.environ, "PYTHONPATH": paths, "SLURM_ARRAY_JOB_ID": "42"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.started.append(run)
        return run

    def wait_for(self, sign: str) -> None:
        deadline = time.monotonic() + 120
        while not (self.signs / sign).exists():
            assert time.monotonic() < deadline, sign
            assert any(run.poll() is None for run in self.started), sign
            time.sleep(0.005)

    def reads(self) -> list[str]:
        """For each header that was read, the part that read it."""
        return (self.signs / "read").read_text().split()


@pytest.fixture
def tasks(source, out, tmp_path):
    array = Tasks(source, out, tmp_path / "signs")
    yield array
    for run in array.started:
        run.kill()
        run.communicate()


def made_at_once(source: Path, out: Path) -> dict[str, bytes]:
    """The content of the store that one ingest makes, with the key of the store `out`."""
    whole = out.with_name("whole.zarr")
    whole.with_name("whole.zarr.key").write_text(out.with_name("ct.zarr.key").read_text())
    ingest(source, whole, CONFIG)
    return content(whole)


def test_tasks_that_start_together_read_the_headers_once(source, out, tasks, threads):
    running = [tasks.start(part, hold="waiting") for part in (0, 1)]
    logs = sorted(run.communicate(timeout=120)[0] for run in running)
    assert [run.returncode for run in running] == [0, 0], logs
    assert len(tasks.reads()) == 4 * FILES
    assert len(set(tasks.reads())) == 1
    assert [log.splitlines() for log in logs] == [
        [f"reading headers: {source}"],
        [
            "waiting for another task of this array, which reads the headers",
            f"headers: as read by another task of this array, from {out}.parts/survey.json.gz",
        ],
    ]
    assert finalise(out) == 4
    assert not out.with_name("ct.zarr.parts").exists()
    assert content(out) == made_at_once(source, out)


def test_if_the_task_that_reads_headers_is_killed_the_next_one_does(source, out, tasks, read):
    killed = tasks.start(0, hold="go")
    tasks.wait_for("read")
    waiting = tasks.start(1, hold="go")
    tasks.wait_for("waiting")
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    (tasks.signs / "go").touch()
    log, _ = waiting.communicate(timeout=120)
    assert waiting.returncode == 0, log
    assert tasks.reads().count("1") == 4 * FILES
    ingest(source, out, CONFIG, part=(0, 2))  # requeued
    assert not read
    assert finalise(out) == 4
    assert content(out) == made_at_once(source, out)


def test_a_task_that_finds_nothing_to_ingest_lets_the_others_look_for_themselves(out, tasks, tmp_path):
    """Its node might be the one where the source is not mounted."""
    running = [tasks.start(part, hold="waiting", kernel=("B99",)) for part in (0, 1)]
    logs = [run.communicate(timeout=120)[0] for run in running]
    assert all("refused: " in log and "none of its 8 series matches pairing.kernel" in log for log in logs)
    assert [tasks.reads().count(part) for part in "01"] == [4 * FILES, 4 * FILES]
    assert {path.name for path in tmp_path.iterdir()} == {"in", "signs"}


def test_a_task_that_runs_again_goes_on_from_the_same_list_and_another_array_from_a_new_one(
    source, out, read, monkeypatch
):
    for part in ((0, 2), (1, 2), (0, 2)):
        ingest(source, out, CONFIG, part=part)
    assert len(read) == 4 * FILES
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "43")
    ingest(source, out, CONFIG, part=(0, 2))
    assert len(read) == 2 * 4 * FILES
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID")
    ingest(source, out, CONFIG, part=(0, 2))
    assert len(read) == 3 * 4 * FILES


def test_the_list_is_for_its_owner_alone_and_not_in_the_store(source, out, read, listed):
    ingest(source, out, CONFIG, part=(0, 2))
    assert listed.stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in listed.parent.iterdir()) == [
        *("0-of-2", "0-of-2.begun", "survey.json.gz", "survey.lock")
    ]
    assert not [path for path in out.rglob("*") if "survey" in path.name]


def test_a_list_of_something_else_is_not_used(source, out, read, tmp_path, monkeypatch):
    thin = CONFIG.model_copy(update={"pairing": PairingConfig(thickness_mm=2.5)})
    monkeypatch.chdir(tmp_path)
    for taken, config, parts in (
        (source, CONFIG, 2),
        (source, CONFIG, 3),
        (source, thin, 3),
        (Path("in"), thin, 3),
    ):
        read.clear()
        for _ in range(2):
            ingest(taken, out, config, part=(0, parts))
        assert read == [taken / path.relative_to(taken) for path in read]
        assert len(read) == 4 * FILES


def test_no_case_of_a_source_that_changes_is_lost_between_two_tasks(source, out, read, monkeypatch):
    """Of lists of their own, the second task's would be shorter by a case, and its cases others."""
    assert len(ingest(source, out, CONFIG, part=(0, 2)).written) == 2
    remove_patient(source, "L000")
    changed = source / "quarter_1mm/L003/quarter_1mm/slice-002.dcm"
    os.utime(changed, ns=(0, 0))
    write_patient(source, "L001a")
    report = ingest(source, out, CONFIG, part=(1, 2))
    assert len(report.written) == 1
    assert [(r.where.split("/")[-2], r.reason) for r in report.rejected] == [
        ("L003", f"{changed}: changed since the folder was searched; search it again")
    ]
    assert finalise(out) == 3
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "43")
    again = [ingest(source, out, CONFIG, part=(part, 2)) for part in (0, 1)]
    assert not any(report.rejected for report in again)
    assert finalise(out) == 5  # what left the source stays in the store
    assert len({case.patient for case in Store(out).cases}) == 5


def test_a_damaged_list_is_not_used(source, out, read, listed):
    ingest(source, out, CONFIG, part=(0, 2))
    listed.write_bytes(listed.read_bytes()[:-20])
    ingest(source, out, CONFIG, part=(1, 2))
    assert len(read) == 2 * 4 * FILES
    ingest(source, out, CONFIG, part=(0, 2))
    assert len(read) == 2 * 4 * FILES
    assert finalise(out) == 4


def test_a_folder_whose_name_is_not_utf_8_is_ingested_by_every_task(tmp_path, out, read):
    for patient in ("L000", "L001"):
        write_patient(tmp_path / "in", patient)
    source = (tmp_path / "in").rename(os.fsdecode(os.fsencode(tmp_path) + b"/M\xfcller"))
    assert [len(ingest(source, out, CONFIG, part=(part, 2)).written) for part in (0, 1)] == [1, 1]
    assert len(read) == 2 * FILES


def test_nothing_is_left_behind_if_nothing_can_be_ingested(tmp_path, read):
    write_series(tmp_path / "in", anatomy(), Options(tags={"Modality": "MR"}))
    out = tmp_path / "new/ct.zarr"
    for part in (0, 1):
        with pytest.raises(UserError, match=r"no series could be ingested; the first reason: .*not CT"):
            ingest(tmp_path / "in", out, CONFIG, part=(part, 2))
    assert [path.name for path in sorted(out.parent.iterdir())] == [
        f"ct.zarr.rejected-{part}-of-2.csv" for part in (0, 1)
    ]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"split_of": {"L999": "test"}}, "'L999' applies to no patient"),
        ({"pairing": PairingConfig(kernel="B99")}, "none of its 8 series matches"),
    ],
)
def test_a_mistake_in_the_settings_leaves_nothing_behind(source, tmp_path, read, settings, said):
    out = tmp_path / "new/ct.zarr"
    with pytest.raises(UserError, match=said):
        ingest(source, out, CONFIG.model_copy(update=settings), part=(0, 2))
    assert not out.parent.exists()


@pytest.fixture
def no_locks(monkeypatch):
    """A file system without locks."""

    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(survey.fcntl, "flock", flock)


def test_where_there_are_no_locks_a_list_that_is_there_is_used(source, out, read, no_locks):
    for part in (0, 1):
        ingest(source, out, CONFIG, part=(part, 2))
    assert len(read) == 4 * FILES
    assert finalise(out) == 4


def test_where_there_are_no_locks_all_go_on_from_the_list_of_the_first_who_has_one(
    source, out, read, no_locks, monkeypatch
):
    """Here, the second task starts later, finds a case more, the first one in its list, and is done before."""

    def slow(*arguments):
        found = as_it_is(*arguments)
        monkeypatch.setattr(survey, "find_pairs", as_it_is)
        write_patient(source, "A")
        ingest(source, out, CONFIG, part=(1, 2))
        return found

    as_it_is = survey.find_pairs
    monkeypatch.setattr(survey, "find_pairs", slow)
    ingest(source, out, CONFIG, part=(0, 2))
    assert finalise(out) == 5
