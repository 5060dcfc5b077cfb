"""A cluster without root and without namespaces, such as a container of one's own has: the same run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from handle import Handle
from jobs_of import field, wait, write_job
from throwaway import missing_packages

from conftest import skip
from runs import losses
from stores import make_store

pytestmark = pytest.mark.slurm
CAP_SETGID, CAP_SETUID = 1 << 6, 1 << 7


@pytest.fixture
def rootless():
    """A cluster without root's powers: if these tests run as root, they are given up for good, but for the two that
    Slurm's daemons use under that name to drop their groups."""
    if missing := missing_packages(netns=False):
        skip(f"no Slurm here: apt install {' '.join(missing)} slurm-wlm-basic-plugins")
    powerless = (
        ("setpriv", "--bounding-set=-all,+setuid,+setgid", "--inh-caps=-all", "--no-new-privs")
        if os.geteuid() == 0
        else ()
    )
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    handle = Handle(folder / "cluster", "ports", 2, powerless)
    yield handle, folder, powerless
    handle.end()
    shutil.rmtree(folder)


def test_a_run_is_submitted_and_comes_to_its_end(rootless):
    handle, folder, powerless = rootless
    capabilities = Path(f"/proc/{handle.keeper.pid}/status").read_text().partition("CapEff:")[2].split()[0]
    assert int(capabilities, 16) in (0, CAP_SETUID | CAP_SETGID)
    config = write_job(folder, make_store(folder / "ct.zarr", [(6, 32, 32)] * 2).path, steps=4)
    command = [*powerless, sys.executable, "-m", "ldct_dist", "submit", config]
    done = subprocess.run(
        [*command, "--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1"],
        cwd=folder,
        env=handle.user(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    job = done.stdout.split()[1]
    over = ("COMPLETED", "FAILED")
    wait(lambda: field(handle, job, "JobState") in over, "the run's end")
    assert len(losses(folder / "runs" / "run")) == 4, (folder / f"runs/run/slurm/{job}.log").read_text()
