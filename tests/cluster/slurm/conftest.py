"""A real Slurm for the tests that are marked `slurm`: one cluster a worker, for all of its tests."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from handle import Handle
from jobs_of import STEPS, train_here
from throwaway import can_have_namespaces, missing_packages

from runs import losses
from stores import make_store

NODES = 6


def skip(reason: str) -> None:
    """Skip the test; fail it where LDCT_REQUIRE_SLURM=1 says that Slurm has to be here."""
    if os.environ.get("LDCT_REQUIRE_SLURM") == "1":
        pytest.fail(f"LDCT_REQUIRE_SLURM=1, but {reason}", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def namespaces() -> bool:
    return can_have_namespaces()


@pytest.fixture(scope="session")
def cluster(namespaces: bool) -> Iterator[Handle]:
    """Six nodes of two GPUs and eight CPUs: machines of their own where namespaces are allowed."""
    missing = missing_packages(namespaces)
    if missing:
        skip(f"no Slurm here: apt install {' '.join(missing)} slurm-wlm-basic-plugins slurm-wlm-mysql-plugin")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # a short path: sockets' names hold 108 characters
    handle = Handle(folder, "netns" if namespaces else "ports", NODES)
    yield handle
    handle.end()
    shutil.rmtree(folder)


@pytest.fixture
def machines(cluster: Handle) -> Handle:
    """A cluster whose nodes can be powered off and cut off."""
    if cluster.mode != "netns":
        pytest.skip(
            "nodes of their own need network namespaces: run as root, in a container with CAP_SYS_ADMIN and CAP_NET_ADMIN"
        )
    return cluster


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    shapes, splits = [(6, 32, 32)] * 4, ["train"] * 3 + ["val"]
    return make_store(tmp_path_factory.mktemp("jobs") / "ct.zarr", shapes, splits).path


@pytest.fixture(scope="module")
def unbroken(store, tmp_path_factory):
    """The run on four local ranks, without Slurm."""
    run = train_here(tmp_path_factory.mktemp("unbroken"), store)
    assert len(losses(run)) == STEPS
    return run


@pytest.fixture
def user_of(cluster, monkeypatch):
    """This process as a user of the cluster."""
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
