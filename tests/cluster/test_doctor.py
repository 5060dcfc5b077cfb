"""What doctor says of what the ranks saw, and an examination of this machine."""

from __future__ import annotations

import errno
import resource
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from commands import command, commands_on_path
from ldct_dist import config as configs
from ldct_dist.cli import app
from ldct_dist.cluster import doctor
from ldct_dist.cluster.checks import Check, Finding, Probe, examine, folder, network, nodes
from ldct_dist.cluster.doctor import checkpoint_bytes, job_command, parse_partition, rank
from ldct_dist.errors import UserError
from ldct_dist.train.config import RunConfig
from ldct_dist.world import World
from runs import write_config

GIB = 2**30


@pytest.fixture
def probe(tmp_path):
    """Three ranks on two nodes; a run whose checkpoints have 1 GiB."""
    return Probe(
        World(), ["n1", "n1", "n2"], tmp_path / "inside", 64, GIB, 5, {"before the time limit": 300.0}, 2
    )


def test_versions_that_differ_are_told_by_node(probe):
    alike = {"torch": "2.13", "driver": "550"}
    assert nodes.judge_software(probe, [alike] * 3) == (True, "alike: torch 2.13, driver 550")
    well, text = nodes.judge_software(probe, [alike, alike, {"torch": "2.12"}])
    assert not well
    assert text.startswith("torch 2.13 on n1, 2.12 on n2; driver 550 on n1, none on n2: load the same")


def test_the_driver_is_told_for_either_kernel_module(tmp_path):
    closed = (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC 12.2.0"
    )
    opened = (
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  560.35.03  Release Build\nGCC version: 12"
    )
    told = tmp_path / "version"
    assert nodes.driver(told) == "unknown"
    for text, version in ((closed, "550.54.15"), (opened, "560.35.03")):
        told.write_text(text)
        assert nodes.driver(told) == version


def test_a_gpu_that_waits_for_a_core_is_told_by_node(probe):
    on_gpus = replace(probe, world=World(device=torch.device("cuda")))
    assert nodes.judge_cores(on_gpus, [4, 4, 8]) == (True, "4 a rank")
    well, text = nodes.judge_cores(on_gpus, [4, 4, 1])
    assert not well
    assert text.startswith("1 a rank on n2, for training and 2 threads")
    assert "--cpus-per-task=3" in text
    assert nodes.judge_cores(probe, [1, 1, 1]) == (True, "1 a rank")  # without GPUs, it is as the machine is


@pytest.mark.parametrize(("main", "findings"), [(True, ["ranks"]), (False, [])])
def test_ranks_that_may_not_train_are_a_finding_of_one_of_them(main, findings, monkeypatch, tmp_path):
    def refuse(**_: object) -> None:
        World(rank=0 if main else 1).refuse("ranks 0, 1 share one GPU (n1, GPU-a)")

    monkeypatch.setattr(World, "join", refuse)
    told: list[Finding] = []
    if main:
        assert not rank(tmp_path, None, 300.0, 1, told.append)
    else:
        with pytest.raises(SystemExit):
            rank(tmp_path, None, 300.0, 1, told.append)
    assert [(finding.name, finding.ok) for finding in told] == [(name, False) for name in findings]


@pytest.mark.parametrize(
    ("skew", "words"), [(40.0, "n2 is 40.0 s ahead of n1"), (-7.5, "n2 is 7.5 s behind n1")]
)
def test_a_wrong_clock_is_told_with_its_side_whatever_one_slow_answer_says(probe, skew, words):
    moments = [10.0, 20.0, 30.0, 40.0, 50.0]
    late = [10.0, 25.0, 30.0, 40.0, 50.0]  # one answer held up for 5 s
    assert nodes.judge_clock(probe, [moments, late, moments])[0]
    well, text = nodes.judge_clock(probe, [moments, late, [m + skew for m in moments]])
    assert not well
    assert words in text


def test_a_signal_that_does_not_arrive_names_rank_and_node(probe):
    assert nodes.judge_signal(probe, [True] * 3) == (True, "SIGUSR1 reached all 3 ranks")
    assert nodes.judge_signal(probe, [None] * 3)[1].startswith("not tried")
    well, text = nodes.judge_signal(probe, [True, True, False])
    assert not well
    assert "did not reach rank 2 on n2" in text


def test_network_findings_name_the_nodes(probe):
    assert network.judge_interface(probe, [("lo", []), ("lo", []), ("ib0", [])]) == (
        True,
        "ib0 between nodes",
    )
    well, text = network.judge_interface(
        probe, [("ib0", []), ("ib0", []), ("eth0", ["NCCL_SOCKET_IFNAME=ib0"])]
    )
    assert not well
    assert "NCCL_SOCKET_IFNAME=ib0 is not on n2" in text
    assert network.judge_ports(probe, [[], [], []])[0]
    well, text = network.judge_ports(probe, [[2], [2], []])
    assert not well
    assert text.startswith("n1 does not reach n2: ")


@pytest.mark.parametrize(
    ("value", "there"),
    [("ib0", True), ("ib", True), ("=ib", False), ("=eth0,ib0", True), ("^docker", True), ("mlx5", False)],
)
def test_interfaces_are_named_in_nccls_syntax(value, there):
    assert network._names_one_of(value, ["lo", "ib0"]) is there


def test_a_folder_that_is_not_shared_names_the_node_that_is_blind(probe):
    sees = ([], 0.01, False, None)
    winner = ([], 0.01, True, None)
    assert folder.judge_shared(probe, [winner, sees, sees])[0]
    well, text = folder.judge_shared(probe, [winner, sees, ([0, 1, 2], 10.0, False, "No such file")])
    assert not well
    assert text.startswith(f"n2 does not see what n1 writes in {probe.folder.parent}")
    well, text = folder.judge_shared(probe, [winner, sees, winner])
    assert not well
    assert "2 ranks made one directory" in text
    readonly = ([2], 10.0, False, None)
    well, text = folder.judge_shared(probe, [readonly, readonly, ([2], 10.0, False, "Read-only file system")])
    assert not well
    assert "what n2 writes" in text
    assert "Read-only" in text


def test_the_time_to_save_is_held_against_every_grace_time(probe):
    seconds = [1.0, 2.0, 2.0]  # the slowest rank writes 32 MiB/s, and its share of 1 GiB is a third
    well, text = folder.judge_save(probe, seconds)
    assert well
    assert text.startswith("about 10.7 s for 1 GiB; 300 s before")
    probe.grace["at preemption"] = 10.0
    well, text = folder.judge_save(probe, seconds)
    assert not well
    assert "only 10 s at preemption" in text


def test_one_file_of_a_checkpoint_is_never_shared_out(probe):
    many = Probe(probe.world, ["n1"] * 64, probe.folder, 64, GIB, 5, {}, 2)
    assert folder.judge_save(many, [1.0] * 64)[1].startswith("about 4.0 s")


def test_room_counts_what_a_run_keeps(probe):
    assert folder.judge_room(probe, [(6 * GIB, 10**6)])[0]
    well, text = folder.judge_room(probe, [(4 * GIB, 10**6)])
    assert not well
    assert "5 checkpoints, 5 GiB" in text
    well, text = folder.judge_room(probe, [(6 * GIB, 10)])
    assert not well
    assert "only 10 more files" in text


def test_room_that_a_quota_forbids_is_refused_without_being_written(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))  # in the place of a quota
    try:
        with pytest.raises(OSError, match="do not fit"):
            folder.reserve(tmp_path / "room", 2**21)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    folder.reserve(tmp_path / "room", 2**21)
    assert list(tmp_path.iterdir()) == []


def test_more_than_is_free_is_not_taken_from_those_who_write_there(probe, monkeypatch):
    probe.folder.mkdir()
    asked = []
    monkeypatch.setattr(folder, "reserve", lambda path, nbytes: asked.append(nbytes))
    assert folder.judge_room(probe, [folder.look_room(replace(probe, checkpoint_bytes=2**10))])[0]
    assert asked == [5 * 2**10]
    large = replace(probe, checkpoint_bytes=2**60)
    assert not folder.judge_room(large, [folder.look_room(large)])[0]
    assert asked == [5 * 2**10]
    space = SimpleNamespace(f_bavail=6 * 2**20, f_frsize=2**10, f_favail=10**6)
    monkeypatch.setattr(folder.os, "statvfs", lambda path: space)
    assert folder.judge_room(probe, [folder.look_room(probe)])[0]  # 5 GiB of 6
    assert asked[1:] == [3 * GIB]


def test_what_a_system_refuses_one_rank_is_a_finding(probe):
    def refused(_: Probe) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    (finding,) = examine(probe, Check(refused, {"room": folder.judge_room}))
    assert (finding.name, finding.ok) == ("room", False)
    assert finding.text == "n1: Disk quota exceeded"


def test_the_partition_says_how_long_a_preempted_job_lives():
    told = "PartitionName=low\n   State=UP PreemptMode=REQUEUE GraceTime=10 Hidden=NO\n"
    assert parse_partition(told) == {"at preemption": 10.0}
    for mode in ("OFF", "SUSPEND", "GANG", "GANG,SUSPEND"):  # none of them ends a job
        assert parse_partition(told.replace("REQUEUE", mode)) == {}
    assert parse_partition(told.replace("REQUEUE", "GANG,CANCEL")) == {"at preemption": 10.0}


def test_preemption_without_any_warning_is_told_and_is_no_fault(probe):
    probe.grace["at preemption"] = 0.0
    well, text = folder.judge_save(probe, [1.0, 2.0, 2.0])
    assert well
    assert text.endswith("; none at preemption: a preempted run goes back to its last checkpoint")


CONTAINER = """\
gpu_bind: per_task:1
container: {{image: x.sif, command: {folder}/box}}
"""


def test_within_a_container_slurm_is_asked_from_outside(tmp_path, monkeypatch):
    scontrol = (
        'case "$2" in hostnames) echo n7; echo n8;; node) echo "NodeAddr=10.0.0.7 NodeHostName=$3";; '
        'partition) echo "PreemptMode=REQUEUE GraceTime=10";; esac'
    )
    box = 'echo "$MASTER_ADDR $MASTER_PORT $LDCT_PARTITION"'
    path = commands_on_path(tmp_path / "bin", scontrol=scontrol, box=box, srun='shift "$SHIFT"; exec "$@"')
    (tmp_path / "site.yaml").write_text(CONTAINER.format(folder=tmp_path / "bin"))
    words = job_command([], tmp_path / "runs", str(tmp_path / "site.yaml"), {"nodes": "2"})
    assert "--gpu-bind=per_task:1" in words
    assert "--export=ALL" in words[: words.index("bash")]
    job = {"SLURM_JOB_ID": "20007", "SLURM_STEP_NODELIST": "n[7-8]", "SLURM_JOB_PARTITION": "low"}
    environment = {"PATH": path, "SHIFT": str(words.index("bash") - 1), "SLURM_PROCID": "0", **job}
    told = subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout
    assert told == "10.0.0.7 10007 PreemptMode=REQUEUE GraceTime=10\n"


def test_the_size_of_a_checkpoint_is_known_before_there_is_one(tmp_path):
    config = configs.read(
        RunConfig, write_config(tmp_path, Path("x")), ["model.name=redcnn3d", "model.size=xl"]
    )
    assert 250e6 * 16 < checkpoint_bytes(config) < 350e6 * 16  # about 300 M parameters


def test_this_machine_is_examined_and_left_clean(tmp_path):
    config = write_config(tmp_path, Path("x"), steps=300, checkpoint={"keep_every": 9})
    done = command("doctor", config, "--write-mib=1")
    assert done.returncode == 0, done.stdout + done.stderr
    names = [
        "versions",
        "GPUs",
        "cores",
        "clocks",
        "signals",
        "interface",
        "ports",
        "all-reduce",
        "shared",
        "write",
        "time",
    ]
    assert [line.split()[1] for line in done.stdout.splitlines()] == [*names, "room"]
    assert {line.split()[0] for line in done.stdout.splitlines()} == {"ok"}
    # 33 for ever, the three newest, the best, and the one being written
    assert "a run keeps 38 checkpoints" in done.stdout
    assert list((tmp_path / "runs").iterdir()) == []


@pytest.mark.parametrize(
    ("gpus", "given", "ranks"), [(0, [], 2), (1, [], 1), (4, [], 4), (4, ["--tasks=2"], 2)]
)
def test_this_machine_is_examined_by_a_rank_a_gpu(monkeypatch, gpus, given, ranks):
    started = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(doctor, "launch_here", lambda arguments, tasks: started.append(tasks) or 0)
    assert CliRunner().invoke(app, ["doctor", *given]).exit_code == 0
    assert started == [ranks]


def test_mistakes_are_said_before_anything_starts(tmp_path):
    for arguments, words in (
        (["doctor", str(tmp_path / "no.yaml")], "no such config file"),
        (["doctor", "--partition=gpu"], "options of srun"),
        (["doctor", "a.yaml", "b.yaml"], "one CONFIG"),
    ):
        error = CliRunner().invoke(app, arguments).exception
        assert isinstance(error, UserError)
        assert words in str(error)
