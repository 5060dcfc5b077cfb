"""A cluster without root and without namespaces, such as a container of one's own has: the same run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from jobs_of import losses, wait, write_config
from throwaway import missing_packages

from conftest import Handle, skip
from stores import make_store

pytestmark = pytest.mark.slurm
NOBODY = 65534


@pytest.fixture
def rootless():
    """A cluster in the name of `nobody`, if these tests run as root; else in that of who runs them."""
    if missing := missing_packages(netns=False):
        skip(f"no Slurm here: apt install {' '.join(missing)} slurm-wlm-basic-plugins")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    as_nobody = ()
    if os.geteuid() == 0:
        as_nobody = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--no-new-privs")
        os.chown(folder, NOBODY, NOBODY)
        try:
            subprocess.run(
                [*as_nobody, sys.executable, "-c", "import torch"], check=True, capture_output=True
            )
        except (OSError, subprocess.CalledProcessError):
            skip(f"user nobody cannot run {sys.executable}")
    handle = Handle(folder / "cluster", "ports", 2, as_nobody)
    yield handle, folder, as_nobody
    handle.end()
    shutil.rmtree(folder)


def test_a_run_is_submitted_and_comes_to_its_end(rootless):
    handle, folder, as_nobody = rootless
    config = write_config(folder, make_store(folder / "ct.zarr", [(6, 32, 32)] * 2).path, "run", steps=4)
    command = [*as_nobody, sys.executable, "-m", "ldct_dist", "submit", config, "--nodes=2"]
    environment = handle.user() | {"HOME": str(folder), "USER": "nobody"}
    done = subprocess.run(
        [*command, "--ntasks-per-node=2"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    job = done.stdout.split()[1]
    wait(lambda: handle.run("squeue", "-h", "--states=all", "-o", "%T").split() == ["COMPLETED"], done.stdout)
    assert len(losses(folder / "runs" / "run")) == 4, (folder / f"runs/run/slurm/{job}.log").read_text()
