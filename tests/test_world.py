"""What a rank takes of the machine that it shares."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys

import pytest
import torch

from ldct_dist import world
from ldct_dist.errors import UserError
from ldct_dist.world import World

HERE = socket.gethostname()


@pytest.mark.parametrize(
    ("mine", "others", "share"),
    [
        (range(8), [(HERE, range(8))] * 3, 2),  # one task of a node, or srun without binding
        (range(8), [(HERE, range(8 * i, 8 * i + 8)) for i in (1, 2, 3)], 8),  # srun that binds each task
        (range(8), [("another-node", range(8))] * 3, 8),
        (range(2), [(HERE, range(2))] * 3, 1),
        (range(6), [(HERE, range(3, 9))], 4),
    ],
)
def test_cores_are_shared_out_over_the_ranks_that_may_use_them(monkeypatch, mine, others, share):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(mine))
    theirs = [{(host, core) for core in cores} for host, cores in others]
    monkeypatch.setattr(World, "gather", lambda self, item: [item, *theirs])
    assert World(0, 4, 0, 4).share_of_cores() == share


@pytest.mark.parametrize(
    ("device", "works_on_cpu", "asked", "threads"),
    [
        ("cpu", False, None, 6),
        ("cuda", False, None, 1),
        ("cuda", True, None, 6),
        ("cuda", True, 3, 3),
    ],
)
def test_a_gpu_leaves_cores_alone_unless_some_arithmetic_is_the_cpus(
    monkeypatch, device, works_on_cpu, asked, threads
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)))
    monkeypatch.setattr(world, "launched_as", lambda: (0, 1, 0, 1))
    monkeypatch.setattr(world, "own_device", lambda *_: torch.device(device))
    monkeypatch.setattr(World, "refuse_uneven_gpus", lambda self: None)
    told = []
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    World.join(asked, works_on_cpu=works_on_cpu)
    assert told == [threads]


@pytest.mark.parametrize("call", [World.on_main, World.on_each])
def test_what_a_disk_refuses_ends_all_ranks_with_a_line_that_says_where(call):
    def act():
        raise OSError(122, "Disk quota exceeded", "/scratch/run")

    with pytest.raises(UserError, match=rf"^rank 0 on {HERE}: .*Disk quota exceeded: '/scratch/run'$"):
        call(World(), act)


LEAVES_LATE_WORK = """
import torch, torch.distributed as dist
from ldct_dist.world import World
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
kept = dist.group.WORLD  # as DDP keeps it
sums = torch.ones(4_000_000)
for _ in range(200):
    dist.all_reduce(sums.view(-1), async_op=True)
World().leave()
"""


def test_a_process_that_leaves_is_not_aborted_by_what_gloo_has_yet_to_do():
    """A busy machine's rank, told in one process: threads of gloo let go of tensors when Python is about to end."""
    done = subprocess.run([sys.executable, "-c", LEAVES_LATE_WORK], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


JOINS = """
import sys
from ldct_dist.errors import UserError
from ldct_dist.world import World
try:
    World.join(timeout_s={timeout_s}).leave()
except UserError as e:
    sys.exit(f"error: {{e}}")
"""


def join(rank: int, size: int, port: int, timeout_s: float = 60, **environment: str) -> subprocess.Popen[str]:
    launcher = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return subprocess.Popen(
        [sys.executable, "-c", JOINS.format(timeout_s=timeout_s)],
        env=os.environ | {key: str(value) for key, value in (launcher | where).items()} | environment,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("bad", [0, 1])
def test_a_rank_without_its_gpu_ends_all_ranks_in_one_line(bad):
    """Not only itself: the others would wait for it, and hold their nodes."""
    port, promised = free_port(), {"SLURM_STEP_ID": "0", "SLURM_GPUS_ON_NODE": "4"}
    ranks = [join(rank, 2, port, **(promised if rank == bad else {})) for rank in range(2)]
    said = [rank.communicate()[1] for rank in ranks]
    assert "4 GPUs there from Slurm" in said[0]
    assert said[0].count("\n") == 1
    assert said[1] == ""
    assert [rank.returncode for rank in ranks] == [1, 2]  # sys.exit of a text is 1; the command makes 2 of it


def test_a_rank_that_does_not_start_is_waited_for_within_bounds():
    rank = join(0, 2, free_port(), timeout_s=1)
    said = rank.communicate()[1]
    assert rank.returncode == 1
    assert f"{HERE} did not meet the other ranks at 127.0.0.1:" in said.splitlines()[-1]
    assert "within 1 s: did one of them not start?" in said


def test_ranks_may_have_more_connections_than_a_shell_allows_files():
    """Two ranks under a limit that they exceed, as 512 do the usual one."""
    port, (_, most) = free_port(), resource.getrlimit(resource.RLIMIT_NOFILE)
    ranks = [join(rank, 2, port) for rank in range(2)]
    for rank in ranks:
        resource.prlimit(rank.pid, resource.RLIMIT_NOFILE, (16, most))
    assert [(rank.communicate()[1], rank.returncode) for rank in ranks] == [("", 0)] * 2


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
