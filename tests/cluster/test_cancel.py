"""What `cancel` tells Slurm, and when, with stand-ins for Slurm's commands."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import test_status

from commands import commands_on_path
from ldct_dist.cluster import cancel as module
from ldct_dist.cluster.cancel import cancel
from ldct_dist.errors import UserError

RUNNING = "echo '3|3|RUNNING|None|0|2026-11-23T11:36:00|'"
ENDED = "echo '3|3|COMPLETED|None|0|2026-11-23T11:36:00|'"
SILENT = "echo 'squeue: error: Socket timed out' >&2; exit 1"


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Callable[..., Path]:
    """Puts Slurm on the PATH, whose squeue does one of `answers` a call, the last again and again; notes all calls."""
    monkeypatch.setattr(module, "_ASK_S", 0.01)
    calls = tmp_path / "calls"
    note = f'echo "${{0##*/}} $*" >> {calls}'

    def put(*answers: str, srun: str = "true") -> Path:
        cases = "".join(f"{i}) {answer};;\n" for i, answer in enumerate(answers, 1))
        asked = f'{note}\ncase $(grep -c "^squeue" {calls}) in {cases}*) {answers[-1]};; esac'
        path = commands_on_path(
            tmp_path / "bin", squeue=asked, scancel=note, scontrol=note, srun=f"{note}\n{srun}"
        )
        monkeypatch.setenv("PATH", path)
        return calls

    return put


HEEDS = "import signal; signal.signal(signal.SIGUSR1, lambda *_: exit()); print(flush=True); signal.pause()"


@pytest.fixture
def trains() -> Iterator[subprocess.Popen]:
    """A process that leaves when it is asked to save and stop."""
    with subprocess.Popen([sys.executable, "-c", HEEDS], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        waiter = threading.Thread(target=process.wait)  # as its parent, that it does not stay as a zombie
        waiter.start()
        yield process
        process.kill()
        waiter.join()


def test_a_slurm_that_is_silent_does_not_say_that_the_ranks_have_saved(slurm, tmp_path):
    run = test_status.make_run(tmp_path / "x", job="3", slurm_restarts=0)
    (run / "slurm").mkdir()
    (run / "slurm" / "job.json").write_text(json.dumps({"job": "3"}))
    calls = slurm(RUNNING, RUNNING, SILENT, SILENT, ENDED)
    cancel(run, grace_s=60, say=lambda _: None)
    told = [line.split()[0] for line in calls.read_text().splitlines()]
    assert told == ["squeue", "scontrol", "scancel", *["squeue"] * 4, "scancel"]


def test_of_an_allocation_only_the_process_that_trains_is_asked(slurm, trains, tmp_path):
    start = {"host": platform.node(), "slurm_node": "n1", "pid": trains.pid, "command": ["-c", HEEDS]}
    run = test_status.make_run(tmp_path / "x", job="3", slurm_restarts=0, **start)
    calls, said = slurm(RUNNING), []
    cancel(run, grace_s=60, say=said.append)
    assert trains.wait() == 0
    assert [line.split()[0] for line in calls.read_text().splitlines()] == ["squeue", "scontrol"]
    assert "scontrol update JobId=3 Requeue=0" in calls.read_text()
    assert "left to end by itself" in said[1]


def test_on_another_node_it_is_asked_by_a_step_of_the_job(slurm, trains, tmp_path):
    """The stand-in for srun is given the process; the ranks' beats then go."""
    start = {"host": "n7.example", "slurm_node": "n7", "pid": trains.pid, "command": ["-c", HEEDS]}
    run = test_status.make_run(tmp_path / "x", job="3", slurm_restarts=0, **start)
    test_status.shows_life(run, age_s=1)
    beats = run / "generations" / "000001" / "ranks-00000.beats"
    calls = slurm(RUNNING, srun=f'while [ "$1" != sh ]; do shift; done; "$@" && rm {beats}')
    cancel(run, grace_s=60, say=lambda _: None)
    assert trains.wait() == 0
    (srun,) = [line for line in calls.read_text().splitlines() if line.startswith("srun")]
    assert "--jobid=3 --overlap" in srun
    assert "--nodelist=n7 " in srun
    assert "scancel" not in calls.read_text()


def test_a_process_that_took_its_number_over_is_left_alone(slurm, trains, tmp_path):
    start = {
        "host": "n7",
        "slurm_node": "n7",
        "pid": trains.pid,
        "command": ["ldct-dist", "train", "other.yaml"],
    }
    run = test_status.make_run(tmp_path / "x", job="3", slurm_restarts=0, **start)
    slurm(RUNNING, srun='while [ "$1" != sh ]; do shift; done; "$@"')
    with pytest.raises(UserError, match="srun"):
        cancel(run, grace_s=60, say=lambda _: None)
    assert trains.poll() is None


def test_a_shell_of_salloc_is_asked_on_its_own_machine(slurm, trains, tmp_path):
    start = {"host": platform.node(), "pid": trains.pid, "command": ["-c", HEEDS]}
    calls = slurm(RUNNING)
    cancel(test_status.make_run(tmp_path / "x", job="3", slurm_restarts=0, **start), grace_s=60)
    assert trains.wait() == 0
    away = test_status.make_run(tmp_path / "y", job="3", slurm_restarts=0, host="login2")
    with pytest.raises(UserError, match="it runs on login2"):
        cancel(away, grace_s=60)
    assert {line.split()[0] for line in calls.read_text().splitlines()} == {"squeue"}


def test_what_an_allocation_does_not_train_any_more_is_no_reason_to_touch_it(slurm, tmp_path):
    run = test_status.make_run(tmp_path / "x", step=100, checkpoint=100, job="3", slurm_restarts=0)
    calls = slurm(RUNNING)
    with pytest.raises(UserError, match="it is done; there is nothing to cancel"):
        cancel(run, grace_s=60)
    shutil.rmtree(run)
    # Requeued, a script of one's own has yet to come to the run.
    requeued = test_status.make_run(tmp_path / "x", job="3", slurm_restarts=0)
    slurm_now = calls.read_text()
    assert "scancel" not in slurm_now
    (tmp_path / "bin" / "squeue").write_text("#!/bin/sh\necho '3|3|PENDING|BeginTime|1|N/A|'\n")
    with pytest.raises(UserError, match="to end that whole job: scancel 3"):
        cancel(requeued, grace_s=60)
    assert calls.read_text() == slurm_now
