"""What a submission says to Slurm, and what its ranks find when they start."""

from __future__ import annotations

import sys

import pytest
from jobs_of import field, wait, write_job
from submitit.core.utils import UncompletedJobError

from ldct_dist import submit
from runs import losses

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("user_of")]
HOSTILE = 'it\'s "quoted" $(touch pwned) `touch pwned` ;& \\ #'


def test_a_value_is_what_slurm_gets_whatever_it_holds(cluster, store, tmp_path, monkeypatch):
    folder = tmp_path / "a folder $(touch pwned) 100%x"  # %x: the job's name, for Slurm
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    job = submit(write_job(folder, store, steps=1), comment=HOSTILE, hold=True)
    text = cluster.run("scontrol", "show", "job", job.job_id)
    assert f"Comment={HOSTILE} \n" in text
    cluster.run("scontrol", "release", job.job_id)
    wait(lambda: losses(folder / "runs" / "run"), "a step")
    assert "submitit INFO" in job.log.read_text()
    cluster.run("scancel", job.job_id)
    assert not list(tmp_path.rglob("pwned"))


def test_what_was_asked_for_goes_before_what_the_environment_says(cluster, store, tmp_path, monkeypatch):
    against = {"TIMELIMIT": "1", "NO_REQUEUE": "1", "PARTITION": "high", "ARRAY_INX": "0-3", "OUTPUT": "x"}
    for name, value in against.items():
        monkeypatch.setenv(f"SBATCH_{name}", value)
    job = submit(write_job(tmp_path, store, steps=1), time="10", partition="main", hold=True)
    text = cluster.run("scontrol", "show", "job", job.job_id)
    cluster.run("scancel", job.job_id)
    for words in ("TimeLimit=00:10:00", "Requeue=1", "Partition=main", f"StdOut={job.log}\n"):
        assert words in text
    assert "ArrayJobId" not in text


def test_a_wrong_number_of_gpus_is_one_line(cluster, store, tmp_path):
    job = submit(write_job(tmp_path, store, steps=1), gpus_per_node=2, cpus_per_task=1)
    wait(lambda: job.done(force_check=True), "the job's end")
    (line,) = {text for text in job.log.read_text().splitlines() if text.startswith("error: ")}
    assert "2 ranks on " in line
    assert "2 GPUs there from Slurm, 0 seen" in line
    assert field(cluster, job.job_id, "ExitCode") == "2:0"
    assert not (tmp_path / "runs" / "run" / "checkpoints").exists()


def test_a_site_may_have_the_run_in_a_container(cluster, store, tmp_path):
    """A stand-in for Apptainer, which notes its words and runs the rest."""
    apptainer = tmp_path / "apptainer"
    apptainer.write_text(
        f'#!/bin/sh\necho "$@" > {tmp_path}/words\nwhile [ "$1" != the.sif ]; do shift; done; shift\nexec "$@"\n'
    )
    apptainer.chmod(0o755)
    site = tmp_path / "here.yaml"
    site.write_text(
        f"container: {{image: the.sif, command: {apptainer}, python: {sys.executable}, nv: false}}\n"
    )
    job = submit(write_job(tmp_path, store, steps=1), site=str(site))
    assert job.results() == [0]
    assert len(losses(tmp_path / "runs" / "run")) == 1
    assert f"--bind={tmp_path}/runs/run --bind" in (tmp_path / "words").read_text()


def test_the_code_of_a_run_is_that_of_its_submission(cluster, store, tmp_path):
    job = submit(write_job(tmp_path, store, steps=1), hold=True)
    (code,) = (tmp_path / "runs/run/slurm/code").glob("*/ldct_dist/train/trainer.py")
    code.write_text(code.read_text() + "\nraise SystemExit('the copy runs')\n")
    cluster.run("scontrol", "release", job.job_id)
    with pytest.raises(UncompletedJobError, match="the copy runs"):
        job.results()
