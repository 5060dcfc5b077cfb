"""The table of runs, from what the real Slurm (22.05) printed and from folders as the trainer writes them."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from commands import commands_on_path
from ldct_dist.checkpoint.manifest import Manifest
from ldct_dist.cluster import jobs
from ldct_dist.cluster.jobs import Job, parse_sacct, parse_squeue
from ldct_dist.cluster.progress import Progress, read_progress
from ldct_dist.cluster.status import Row, in_queue, render, span, state_of, status
from ldct_dist.errors import UserError

SQUEUE = """\
9|9|CANCELLED|Priority|0|2026-11-23T11:36:03|
1|1|COMPLETED|None|0|2026-11-23T11:36:00|
2|2|FAILED|NonZeroExitCode|0|2026-11-23T11:36:00|
4|4|PENDING|BeginTime|1|2026-11-23T11:36:08|
5|5_1|PENDING|JobArrayTaskLimit|0|N/A|
5|5_2|PENDING|JobArrayTaskLimit|0|N/A|
7|7|PENDING|Resources|0|2027-11-23T11:36:02|
3|3|RUNNING|None|0|2026-11-23T11:36:00|
8|5_0|RUNNING|None|0|2026-11-23T11:36:02|
""".splitlines()
SACCT = """\
1|1|COMPLETED|0:0
2|2|FAILED|3:0
4|4|REQUEUED|0:0
4|4|NODE_FAIL|0:0
4|4|CANCELLED by 0|0:0
8|5_0|RUNNING|0:0
5|5_[1-2%1]|PENDING|0:0
11|11|FAILED|0:9
""".splitlines()


def test_squeue_is_read_with_arrays_reasons_and_requeues():
    known = parse_squeue(SQUEUE)
    assert known["4"] == Job("4", "PENDING", "BeginTime", 1, "2026-11-23T11:36:08")
    assert known["5_1"].reason == "JobArrayTaskLimit"
    assert known["5_1"].start is None
    assert known["8"] == known["5_0"]
    assert known["8"].id == "5_0"
    assert [j for j in ("9", "1", "2", "4", "3") if known[j].active] == ["4", "3"]


def test_the_accounting_is_read_with_the_lives_of_a_job():
    known = parse_sacct(SACCT)
    assert known["4"] == Job("4", "CANCELLED", None, requeues=2)
    assert known["2"].reason == "exit code 3"
    assert known["11"].reason == "killed by signal 9"
    assert known["8"] == known["5_0"]


def test_slurm_is_asked_once_for_all_and_only_about_what_it_forgot_a_second_time(tmp_path, monkeypatch):
    calls = tmp_path / "calls"
    script = f'echo "$0 $*" >> {calls}; '
    path = commands_on_path(
        tmp_path / "bin",
        squeue=script + f"cat <<'E'\n{SQUEUE[-1]}\nE",
        sacct=script + f"cat <<'E'\n{SACCT[1]}\nE",
    )
    monkeypatch.setenv("PATH", path)
    known, fault = jobs.ask({"5_0", "2"})
    assert fault is None
    assert known["5_0"].state == "RUNNING"
    assert known["2"].state == "FAILED"
    first, second = calls.read_text().splitlines()
    assert "squeue" in first
    assert "--jobs=2,5_0" in first
    assert second.endswith("-j 2 -o JobIDRaw,JobID,State,ExitCode")


@pytest.mark.parametrize(
    ("squeue", "words"),
    [
        ("exec sleep 60", "no answer from Slurm within 0.2 s"),
        ("echo 'squeue: error: unable to contact slurm controller' >&2; exit 1", "unable to contact"),
    ],
)
def test_a_slurm_that_does_not_answer_is_one_line(tmp_path, monkeypatch, squeue, words):
    monkeypatch.setenv("PATH", commands_on_path(tmp_path / "bin", squeue=squeue))
    known, fault = jobs.ask({"1"}, timeout_s=0.2)
    assert known == {}
    assert words in fault
    assert "\n" not in fault


def test_no_slurm_at_all_is_one_line_and_not_needed_without_a_job(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert jobs.ask({"1"}) == ({}, "squeue is not on the PATH of this machine")
    assert jobs.ask(set()) == ({}, None)


START = {
    "generation": 1,
    "from_step": 0,
    "command": ["ldct-dist", "train", "x.yaml"],
    "host": "elsewhere",
    "pid": 1,
}


def make_run(
    folder: Path,
    step: int = 40,
    checkpoint: int | None = 30,
    steps: int = 100,
    job: str | None = None,
    workload: str = "workload",
    **start,
):
    """A run folder as the trainer leaves it after `step` steps, with reports every 10, 2 s apart."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"name: x\nsteps: {steps}\n")
    lines = [json.dumps({"step": s, "loss": 9.0}) for s in range(1, step + 1)]
    (folder / "losses.jsonl").write_text("\n".join([*lines, '{"step": 9']))
    (folder / "environment.json").write_text(json.dumps([{**START, "slurm_job": job, **start}]))
    if checkpoint is not None:
        saved = folder / "checkpoints" / f"step-{checkpoint:08d}"
        saved.mkdir(parents=True)
        Manifest(1, checkpoint, {}, {}).write(saved)
    board = SummaryWriter(str(folder / "tensorboard"))
    for s in range(10, step + 1, 10):
        board.add_scalar("train/loss", 5.0 - s / 100, s, walltime=1000 + s / 5)
        board.add_scalar(f"{workload}/crops_per_s", 64.0, s, walltime=1000 + s / 5)
        board.add_scalar(f"{workload}/data_wait_percent", 0.5, s, walltime=1000 + s / 5)
    board.add_text("a note", "x" * 5000, step)  # a large record, which is passed over
    board.close()
    return folder


@pytest.mark.parametrize("workload", ["workload", "speed"])  # the second: of a job that runs earlier code
def test_the_folder_alone_says_how_far_a_run_is(tmp_path, workload):
    progress = read_progress(make_run(tmp_path / "x", workload=workload))
    assert (progress.step, progress.steps, progress.checkpoint) == (40, 100, 30)
    assert progress.loss == pytest.approx(4.6)
    assert (progress.crops_per_s, progress.wait_percent) == (64.0, 0.5)
    assert progress.seconds_a_step == pytest.approx(0.2)
    assert progress.eta_s == pytest.approx(12.0)


def test_an_event_file_cut_short_anywhere_is_read_as_far_as_it_goes(tmp_path):
    run = make_run(tmp_path / "x")
    (events,) = (run / "tensorboard").iterdir()
    whole = events.read_bytes()
    for size in range(0, len(whole), 41):
        events.write_bytes(whole[:size])
        read_progress(run)
    events.write_bytes(b"\xff" * 300)
    assert read_progress(run).crops_per_s is None


def bytes_read() -> int:
    """By this process, so far."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_of_a_million_steps_no_more_is_read_than_of_few(tmp_path):
    run = make_run(tmp_path / "x")
    expected = read_progress(run)
    (events,) = (run / "tensorboard").iterdir()
    whole = events.read_bytes()
    events.write_bytes(whole * 1500)  # 10 MB, a large record in each copy
    with open(run / "losses.jsonl", "r+b") as f:
        lines = f.read()
        f.write(b"\n" + lines * 5000)
    before = bytes_read()
    progress = read_progress(run)
    assert bytes_read() - before < 500_000
    assert replace(progress, written=None) == replace(expected, written=None)


def test_a_run_lives_by_its_pid_here_and_by_its_latest_sign_elsewhere(tmp_path):
    silent = make_run(tmp_path / "silent")
    os.utime(silent / "losses.jsonl", (1000, 1000))
    make_run(tmp_path / "afar")
    make_run(tmp_path / "done", step=100, checkpoint=100)
    make_run(tmp_path / "now-of-fewer-steps", step=100, checkpoint=100, steps=80)
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with subprocess.Popen(command) as process:
        here = {"host": platform.node(), "pid": process.pid}
        make_run(tmp_path / "here", **here, command=["-c", *command[2:]])
        make_run(tmp_path / "not-it", **here, command=["ldct-dist", "train", "other.yaml"])
        rows, fault = status([tmp_path])
        process.kill()
    assert fault is None
    assert {r.name: r.state for r in rows} == {
        "silent": "stopped",
        "afar": "running",
        "done": "done",
        "now-of-fewer-steps": "done",
        "here": "running",
        "not-it": "stopped",
    }
    assert status([tmp_path / "here"])[0][0].state == "stopped"
    (row,) = (r for r in rows if r.name == "silent")
    assert row.notes == ["10 steps since its last checkpoint, which the next start will repeat"]


@pytest.mark.parametrize(
    ("job", "state"),
    [
        (Job("1", "PENDING"), "pending"),
        (Job("1", "REQUEUED"), "pending"),
        (Job("1", "SPECIAL_EXIT"), "pending"),
        (Job("1", "RUNNING"), "running"),
        (Job("1", "COMPLETING"), "running"),
        (Job("1", "SIGNALING"), "running"),
        (Job("1", "STOPPED"), "running"),
        (Job("1", "CANCELLED"), "cancelled"),
        (Job("1", "TIMEOUT"), "failed"),
        (Job("1", "COMPLETED"), "stopped"),
    ],
)
def test_slurm_knows_best_what_a_job_does(job, state):
    assert state_of(Progress(step=3, last_start={**START}), job, now=0.0) == state


def test_what_failed_is_told_with_the_last_line_of_its_error(tmp_path, monkeypatch):
    run = make_run(tmp_path / "x", job="2")
    (run / "slurm").mkdir()
    (run / "slurm" / "2.log").write_text(
        "step 40\nerror: x.zarr: not a store; make one\nsrun: error: node1: task 0: Exited with exit code 2\n"
    )
    monkeypatch.setenv("PATH", commands_on_path(tmp_path / "bin", squeue=f"echo '{SQUEUE[2]}'"))
    ((row,), _) = status([run])
    assert row.state == "failed"
    assert row.notes[:2] == ["job 2, failed, NonZeroExitCode", "error: x.zarr: not a store; make one"]


def test_a_hang_is_told_by_the_rank_that_left(tmp_path, monkeypatch):
    run = make_run(tmp_path / "x", job="2")
    (run / "slurm").mkdir()
    line = (
        "no answer for 300 s from rank 3 on node2 (last seen at step 40, backward); rank 1 on node1 (at step 40, "
        "backward) leaves with exit code 77: start the same command again"
    )
    (run / "slurm" / "2.log").write_text(f"no case of yours\n{line}\nsrun: error: node1: task 1: Exited\n")
    monkeypatch.setenv("PATH", commands_on_path(tmp_path / "bin", squeue=f"echo '{SQUEUE[2]}'"))
    assert status([run])[0][0].notes[1] == line


def shows_life(run: Path, age_s: float) -> None:
    """As the ranks of its first start do: the file of their beats, last written so long ago."""
    claim = run / "generations" / "000001"
    claim.mkdir(parents=True)
    beats = claim / "ranks-00000.beats"
    beats.write_text("{}")
    os.utime(beats, (time.time() - age_s,) * 2)


def test_a_run_is_not_what_its_allocation_is(tmp_path, monkeypatch):
    """Trained in an allocation that lives on, as those of salloc and Jupyter do."""
    runs, there = tmp_path / "runs", {"job": "3", "slurm_restarts": 0}
    shows_life(make_run(runs / "validates", **there), age_s=20)
    with open(runs / "validates" / "config.yaml", "a") as f:
        f.write("hang_s: 5\n")  # less than files of another node may take to be seen here
    shows_life(make_run(runs / "killed", **there), age_s=400)
    for name in ("validates", "killed"):
        os.utime(runs / name / "losses.jsonl", (1000, 1000))
    (make_run(runs / "left", **there) / "generations" / "000001").mkdir(parents=True)
    make_run(runs / "done", step=100, checkpoint=100, **there)
    shows_life(make_run(runs / "ends", step=100, checkpoint=100, **there), age_s=1)  # its last validation
    monkeypatch.setenv("PATH", commands_on_path(tmp_path / "bin", squeue=f"echo '{SQUEUE[-2]}'"))
    rows, _ = status([runs])
    assert {row.name: row.state for row in rows} == {
        "validates": "running",
        "killed": "stopped",
        "left": "stopped",
        "done": "done",
        "ends": "running",
    }
    assert {run.name for run in in_queue(runs.iterdir())} == {"validates", "ends"}


def test_a_script_of_ones_own_that_is_requeued_has_yet_to_come_to_its_run(tmp_path, monkeypatch):
    run = make_run(tmp_path / "x", job="4", slurm_restarts=0)
    done = make_run(tmp_path / "y", step=100, checkpoint=100, job="4", slurm_restarts=0)
    os.utime(run / "losses.jsonl", (1000, 1000))
    for state, word in (("PENDING", "pending"), ("RUNNING", "running")):
        line = f"4|4|{state}|BeginTime|1|N/A|"
        monkeypatch.setenv("PATH", commands_on_path(tmp_path / state, squeue=f"echo '{line}'"))
        assert [row.state for row in status([run, done])[0]] == [word, "done"]


def test_a_run_that_is_done_and_was_submitted_for_more_steps_is_not_done(tmp_path, monkeypatch):
    run = make_run(tmp_path / "x", step=100, checkpoint=100, job="2", slurm_restarts=0)
    (run / "slurm").mkdir()
    (run / "slurm" / "job.json").write_text('{"job": "3"}')
    monkeypatch.setenv("PATH", commands_on_path(tmp_path / "bin", squeue=f"echo '{SQUEUE[-2]}'"))
    assert status([run])[0][0].state == "running"
    make_run(tmp_path / "y", step=100, checkpoint=100, job="3", slurm_restarts=0)
    (tmp_path / "y" / "slurm").mkdir()
    (tmp_path / "y" / "slurm" / "job.json").write_text('{"job": "3"}')
    assert status([tmp_path / "y"])[0][0].state == "done"  # the job has nothing left to do


def test_one_unreadable_run_does_not_hide_the_others(tmp_path):
    make_run(tmp_path / "good")
    for name, file in (("a", "config.yaml"), ("b", "environment.json"), ("c", "losses.jsonl")):
        bad = make_run(tmp_path / name)
        (bad / file).write_bytes(b"\x00\xff{]\n")
    rows, _ = status([tmp_path])
    assert [r.state for r in rows] == ["unreadable"] * 3 + ["running"]
    assert str(tmp_path / "b" / "environment.json") in rows[1].notes[0]


def test_a_path_without_a_run_is_a_mistake(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match="name a run"):
            status([path])


def test_runs_of_two_sweeps_are_told_apart_whatever_folders_are_asked_for(tmp_path, monkeypatch):
    runs = [make_run(tmp_path / "runs" / way) for way in ("a-sweep/lr-0.1", "b-sweep/lr-0.1", "mayo")]
    monkeypatch.chdir(tmp_path / "runs" / "mayo")
    for paths, names in (
        (["runs"], ["a-sweep/lr-0.1", "b-sweep/lr-0.1", "mayo"]),
        (["runs/b-sweep", "runs/a-sweep"], ["b-sweep/lr-0.1", "a-sweep/lr-0.1"]),
        (["runs/mayo", "runs/a-sweep"], ["mayo", "a-sweep/lr-0.1"]),
        (["runs/a-sweep"], ["lr-0.1"]),
        (["runs/mayo"], ["mayo"]),
    ):
        rows, _ = status([tmp_path / path for path in paths])
        assert [row.name for row in rows] == names
        assert {row.folder for row in rows} <= set(runs)
    assert [row.name for row in status([Path()])[0]] == ["mayo"]


def test_the_table_fits_eighty_columns():
    now = 1_000_000.0
    running = Progress(3200, 50000, 3.21456, 812.4, 0.41, 0.16, 3000, now - 250, now)
    done = replace(running, step=50000, checkpoint=50000, checkpoint_time=now - 3 * 86400)
    rows = [
        Row("mayo-unet3d", Path("a"), "running", running, notes=["job 12, requeued twice"]),
        Row("sweep-with-a-long-name_lr=1e-4_model=nafnet3d-s", Path("b"), "done", done),
        Row("later", Path("c"), "pending", Progress(), notes=["job 13, waits for: Resources"]),
    ]
    assert render(rows, now, 80).splitlines() == [
        "run          state           step  loss  crops/s  wait         saved    ETA",
        "mayo-unet3d  running   3200/50000  3.21      812  0.4%      3000, 4m  2h04m",
        "  job 12, requeued twice",
        "sweep-with-a-long-name_lr=1e-4_model=nafnet3d-s",
        "             done     50000/50000  3.21        -     -  50000, 3d00h      -",
        "later        pending            -     -        -     -             -      -",
        "  job 13, waits for: Resources",
    ]
    assert all(len(line) <= 80 for line in render(rows, now, 80).splitlines())
    assert len(render(rows, now, None).splitlines()[1]) > 80  # not a terminal: nothing is folded


def test_json_says_the_same_for_scripts(tmp_path):
    ((row,), _) = status([make_run(tmp_path / "x")])
    told = json.loads(json.dumps(row.as_json(time.time())))
    assert told["state"] == "running"
    assert (told["step"], told["steps"], told["checkpoint_step"]) == (40, 100, 30)
    assert told["data_wait_percent"] == 0.5
    assert told["job"] is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-3, "0s"), (59.9, "59s"), (60, "1m"), (11100, "3h05m"), (187200, "2d04h"), (1e7, "115d")],
)
def test_spans_of_time_are_short(seconds, text):
    assert span(seconds) == text
