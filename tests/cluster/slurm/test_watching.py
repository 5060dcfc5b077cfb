"""Status, cancel, doctor and sweep against a real Slurm."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ldct_dist.cluster.doctor import job_command
from runs import write_config
from stores import make_store

pytestmark = pytest.mark.slurm


@pytest.fixture
def config(tmp_path):
    make_store(tmp_path / "ct.zarr", [(10, 40, 40), (8, 32, 40)], ["train", "val"])
    return write_config(tmp_path, tmp_path / "ct.zarr", steps=4, log={"images": False})


@pytest.fixture
def run(cluster) -> Callable[..., subprocess.CompletedProcess]:
    """Run a command with the cluster's Slurm on its PATH."""

    def command(*words: str | Path) -> subprocess.CompletedProcess:
        return subprocess.run(
            list(map(str, words)),
            env=cluster.user(),
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    return command


@pytest.fixture
def ldct(run):
    return lambda *words: run(sys.executable, "-m", "ldct_dist", *words)


def wait_for(what: str, ready: Callable[[], bool], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, what
        time.sleep(0.5)


def rows(ldct, *paths: Path) -> dict[str, dict]:
    told = ldct("status", "--json", *paths)
    assert told.returncode == 0, told.stderr
    return {row["name"]: row for row in json.loads(told.stdout)}


def test_a_sweep_is_watched_cancelled_and_goes_on(ldct, run, config, tmp_path):
    """One array through its life: running, one run asked to stop and requeued alone, the other cancelled."""
    folder = tmp_path / "runs" / "run-sweep"
    sweep = ["sweep", config, "seed=0,1", "steps=1000", "--cpus-per-task=1"]
    first = ldct(*sweep)
    assert first.returncode == 0, first.stderr
    job = rows(ldct, folder)["seed-0"]["job"]["id"].removesuffix("_0")
    wait_for("both runs step", lambda: all(row["step"] for row in rows(ldct, folder).values()))
    assert ldct(*sweep).stdout.count("in the queue already") == 2

    # The last task of an array bears the array's own number, and must be requeued alone.
    run("scancel", "--signal=USR1", f"{job}_1")
    wait_for("requeued", lambda: rows(ldct, folder)["seed-1"]["job"]["requeues"] == 1)
    table = rows(ldct, folder)
    stopped = table["seed-1"]["checkpoint_step"]
    assert table["seed-1"]["step"] == stopped > 0
    assert table["seed-0"]["state"] == "running"
    assert table["seed-0"]["job"]["requeues"] == 0
    assert f"job {job}_1, requeued once" in ldct("status", folder).stdout

    cancelled = ldct("cancel", folder / "seed-0")
    assert cancelled.returncode == 0, cancelled.stderr
    row = rows(ldct, folder)["seed-0"]
    assert row["state"] == "cancelled"
    assert row["checkpoint_step"] == row["step"] > 0

    wait_for("resumed", lambda: rows(ldct, folder)["seed-1"]["step"] > stopped)
    run("scancel", job)
    wait_for("gone", lambda: not run("squeue", "-h").stdout.strip())
    starts = json.loads((folder / "seed-1" / "environment.json").read_text())
    assert [start["from_step"] for start in starts] == [0, stopped]
    assert {start["slurm_job"] for start in starts} == {f"{job}_1"}


def test_pending_and_failed_runs_say_why(ldct, run, config, tmp_path):
    folder = tmp_path / "runs" / "run-sweep"
    assert ldct("sweep", config, "seed=1,2", "--hold").returncode == 0
    table = rows(ldct, folder)
    assert {row["state"] for row in table.values()} == {"pending"}
    assert "waits for: JobHeldUser" in table["seed-2"]["notes"][0]
    cancelled = ldct("cancel", folder / "seed-2")
    assert "no checkpoint" in cancelled.stdout
    shutil.rmtree(tmp_path / "ct.zarr")
    run("scontrol", "release", table["seed-1"]["job"]["id"])
    wait_for("failed", lambda: rows(ldct, folder)["seed-1"]["state"] == "failed")
    table = rows(ldct, folder)
    assert any(f"{tmp_path}/ct.zarr: " in note for note in table["seed-1"]["notes"])
    assert table["seed-2"]["state"] == "cancelled"


FAULTS = """\
#!/bin/sh
# On the second task: a clock 40 s ahead, SIGUSR1 blocked, and a folder of its own where the others share one.
[ "$SLURM_PROCID" = 1 ] || exec "$@"
exec unshare --mount sh -c 'mount -t tmpfs none {runs}; exec env --block-signal=USR1 PYTHONPATH={ahead} "$@"' sh "$@"
"""
AHEAD = "import time\nreal = time.time\ntime.time = lambda: real() + 40\n"


def test_doctor_is_green_on_a_healthy_cluster(ldct, config):
    done = ldct("doctor", config, "--nodes=2", "--tasks=1", "--write-mib=1")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 12
    assert all(line.startswith("ok ") for line in lines)
    assert any("at preemption" in line for line in lines)


def test_doctor_examines_a_container_that_has_no_slurm(ldct, config, tmp_path):
    """A stand-in for Apptainer, within which no command is found."""
    apptainer, site = tmp_path / "apptainer", tmp_path / "here.yaml"
    apptainer.write_text(
        '#!/bin/sh\nwhile [ "$1" != the.sif ]; do shift; done; shift\nPATH=/nowhere\nexec "$@"\n'
    )
    apptainer.chmod(0o755)
    site.write_text(f"container: {{image: the.sif, command: {apptainer}, python: {sys.executable}}}\n")
    done = ldct("doctor", config, "--nodes=2", "--tasks=1", "--write-mib=1", f"--site={site}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 12
    assert "not tried: there is no scancel" in done.stdout
    assert "at preemption" in done.stdout


def test_doctor_names_what_is_wrong_and_where(machines, run, config, tmp_path):
    runs, ahead, wrapper = tmp_path / "runs", tmp_path / "ahead", tmp_path / "faults.sh"
    runs.mkdir()
    ahead.mkdir()
    (ahead / "sitecustomize.py").write_text(AHEAD)
    wrapper.write_text(FAULTS.format(runs=runs, ahead=ahead))
    wrapper.chmod(0o755)
    words = job_command(["--write-mib=1", f"--runs={runs}", str(config)], runs, None, {"nodes": "2"})
    words.insert(words.index("bash"), str(wrapper))
    done = run(*words)
    assert done.returncode == 1, done.stdout + done.stderr
    bad = {line.split()[1]: line for line in done.stdout.splitlines() if line.startswith("BAD")}
    assert bad.keys() == {"clocks", "signals", "shared"}, done.stdout
    assert "40.0 s ahead of" in bad["clocks"]
    assert "did not reach rank 1" in bad["signals"]
    assert str(runs) in bad["shared"]
