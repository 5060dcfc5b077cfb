"""The cluster the tests run on: it is there, and it goes, whatever ends the tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from jobs_of import wait

pytestmark = pytest.mark.slurm


def test_jobs_run_on_nodes_of_their_own(machines):
    hosts = machines.run("srun", "--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "hostname")
    assert sorted(hosts.split()) == ["node1", "node1", "node2", "node2"]


def mentions(folder: Path) -> list[str]:
    """The command lines that name this folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line, environment = ((process / name).read_bytes() for name in ("cmdline", "environ"))
        except OSError:  # ended meanwhile
            continue
        if str(folder).encode() in line + environment and int(process.name) != os.getpid():
            found.append(line.decode())
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
        try:
            assert tests.stdout.readline() == "up\n"
            assert any("slurmctld" in line for line in mentions(tmp_path / "c"))
            wait(lambda: any("sleep\x001001" in line for line in mentions(tmp_path / "c")), "the job's work")
        finally:
            tests.kill()
    wait(lambda: mentions(tmp_path / "c") == [], "the end of all of them", 30)
