"""The cluster the tests run on: it is there, and it goes, whatever ends the tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slurm


def test_jobs_run_on_nodes_of_their_own(machines):
    hosts = machines.run("srun", "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "hostname")
    assert sorted(hosts.split()) == ["node1", "node1", "node2", "node2"]


def mentions(folder: Path) -> list[str]:
    """The command lines that name this folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        except OSError:
            continue
        if str(folder).encode() in words and int(process.name) != os.getpid():
            found.append((process / "cmdline").read_bytes().decode())
    return found


def test_nothing_is_left_when_the_tests_are_killed(cluster, tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from handle import Handle\n"
        f"h = Handle(Path({str(tmp_path / 'c')!r}), {cluster.mode!r}, 1)\n"
        "h.run('sbatch', '--output=/dev/null', '--wrap', f'sleep 1000 & exec sleep 1001')\n"
        "while 'RUNNING' not in h.run('squeue', '-h', '-o', '%T'): time.sleep(0.1)\n"
        "print('up', flush=True); time.sleep(1000)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True
    ) as tests:
        assert tests.stdout.readline() == "up\n"
        assert any("slurmctld" in line for line in mentions(tmp_path / "c"))
        assert any("sleep\x001001" in line for line in mentions(tmp_path / "c"))
        tests.send_signal(signal.SIGKILL)
    end = time.monotonic() + 30
    while mentions(tmp_path / "c") and time.monotonic() < end:
        time.sleep(0.1)
    assert mentions(tmp_path / "c") == []
