"""Whatever a job is submitted from, it is the job that its script says."""

from __future__ import annotations

import pytest

from commands import commands_on_path
from ldct_dist import submit
from ldct_dist.cluster import jobs
from ldct_dist.cluster.environment import left_out
from runs import write_config

OF_ANOTHER_JOB = {
    "SLURM_JOB_ID": "3",
    "SLURM_ARRAY_JOB_ID": "3",
    "SLURM_CPU_BIND": "quiet,mask_cpu:0x1",
    "SLURM_JOB_END_TIME": "1",
    "SLURM_RESTART_COUNT": "2",
    "SLURMD_NODENAME": "n3",
    "SRUN_CPUS_PER_TASK": "1",
    "PMI_RANK": "1",
    "PMIX_RANK": "1",
    "PMI2_RANK": "1",
    "MASTER_ADDR": "n3",
    "MASTER_PORT": "29500",
    "RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "0",
    "TORCHELASTIC_RUN_ID": "none",
    "SUBMITIT_LOCAL_NTASKS": "4",
}
OF_A_PERSON = {
    "SLURM_CONF": "/etc/here.conf",
    "SLURM_CLUSTERS": "a",
    "SLURM_TIME_FORMAT": "relative",
    "SBATCH_ACCOUNT": "radiology",
    "MY_RANK": "1",
    "OMPI_MCA_btl": "tcp",
}
AGAINST_THE_SCRIPT = {
    "SBATCH_TIMELIMIT": "1",
    "SBATCH_OUTPUT": "x",
    "SBATCH_SIGNAL": "TERM",
    "SBATCH_ARRAY_INX": "0-3",
}


@pytest.fixture
def seen(tmp_path, monkeypatch):
    """The names in the environment of the sbatch that is called next."""
    for name, value in (OF_ANOTHER_JOB | OF_A_PERSON | AGAINST_THE_SCRIPT).items():
        monkeypatch.setenv(name, value)
    sbatch = f"env > {tmp_path}/seen; case $* in *parsable*) echo 7;; *) echo Submitted batch job 7;; esac"
    path = commands_on_path(tmp_path / "bin", sbatch=sbatch, srun="", squeue="", sacct="")
    monkeypatch.setenv("PATH", path)
    return lambda: {line.partition("=")[0] for line in (tmp_path / "seen").read_text().splitlines()}


def right(names: set[str]) -> bool:
    """Whether all that a person has set is there, and nothing that is another job's, or against the script."""
    return OF_A_PERSON.keys() <= names and not (OF_ANOTHER_JOB | AGAINST_THE_SCRIPT).keys() & names


def test_a_run_is_submitted_without_variables_of_another_job_or_that_override_its_script(seen, tmp_path):
    job = submit(write_config(tmp_path, tmp_path / "ct.zarr", steps=4), time="10")
    assert job.job_id == "7"
    assert right(seen())


def test_any_other_script_is_submitted_without_them_too(seen, tmp_path):
    script = tmp_path / "job.sbatch"
    script.write_text("#!/bin/bash\n#SBATCH --output=a.log\n#SBATCH --signal=USR2@300\n#SBATCH --time=10\n")
    assert jobs.sbatch(script) == "7"
    assert right(seen())


@pytest.mark.parametrize(
    ("option", "variables"),
    [
        ("partition=gpu", ["SBATCH_PARTITION"]),
        ("gpus-per-node=4", ["SBATCH_GPUS_PER_NODE"]),
        ("time=10", ["SBATCH_TIMELIMIT"]),
        ("requeue", ["SBATCH_REQUEUE", "SBATCH_NO_REQUEUE"]),
        ("no-requeue", ["SBATCH_REQUEUE", "SBATCH_NO_REQUEUE"]),
        ("array=0-3", ["SBATCH_ARRAY_INX"]),
        ("mem=0", ["SBATCH_MEM_PER_NODE", "SBATCH_MEM_PER_CPU"]),
        ("mem-per-cpu=2G", ["SBATCH_MEM_PER_NODE", "SBATCH_MEM_PER_CPU"]),
        ("cpus-per-task=8", ["SBATCH_CPUS_PER_GPU"]),
        ("nodes=2", ["SBATCH_ERROR", "SBATCH_WAIT", "SBATCH_ARRAY_INX"]),
    ],
)
def test_what_the_script_says_goes_before_the_environment(option, variables, monkeypatch):
    for variable in variables:
        monkeypatch.setenv(variable, "1")
        assert variable in left_out(f"#!/bin/bash\n#SBATCH --{option}\n")


def test_what_the_script_does_not_say_is_left_to_the_environment(monkeypatch):
    for variable in (
        "SBATCH_ACCOUNT",
        "SBATCH_PARTITION",
        "SBATCH_TIMELIMIT",
        "SBATCH_EXPORT",
        "SBATCH_NO_REQUEUE",
    ):
        monkeypatch.setenv(variable, "x")
        assert variable not in left_out("#!/bin/bash\n#SBATCH --nodes=2\n: --partition=gpu\n")
