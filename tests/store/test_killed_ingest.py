"""An ingest of which processes are killed, one or all of them."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from ldct_dist.errors import UserError
from ldct_dist.store import layout, workers
from ldct_dist.store.ingest import ingest
from ldct_dist.store.pairing import PairingConfig, find_pairs
from ldct_dist.store.record import read_record
from ldct_dist.store.task import make_case, task
from sources import CONFIG, QUICK, content, write_patients


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
    assert "its process was killed, probably because memory ran out" in results[deadly.name]
    assert layout.list_cases(out) == [fine.name]


def test_a_case_too_large_for_memory_is_refused_by_its_worker_itself(tmp_path, out, monkeypatch):
    (pair,), _ = find_pairs(write_patients(tmp_path / "in", 1), PairingConfig())
    layout.create(out)
    large = task(out, pair, "train", b"key", check=None, dose=0.25, seed=0, simulation=QUICK)
    monkeypatch.setattr("ldct_dist.store.task.read_series", lambda series: np.empty(1 << 60, np.int8))
    assert re.search(r": memory ran out \(.*\); give fewer workers or more memory$", make_case(large))
    assert layout.list_cases(out) == []


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
