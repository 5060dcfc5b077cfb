"""A real Slurm for the tests that are marked `slurm`: one cluster for all of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from throwaway import can_have_namespaces, missing_packages

NODES = 6


class Handle:
    """What a test holds of a cluster: its environment, and its switches."""

    def __init__(self, folder: Path, mode: str, nodes: int, prefix: tuple[str, ...] = ()) -> None:
        self.folder, self.mode = folder, mode
        keeper = [sys.executable, str(Path(__file__).with_name("keeper.py")), str(folder), mode, str(nodes)]
        self.keeper = subprocess.Popen(
            [*prefix, *keeper],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.environment: dict[str, str] = self._answer()

    def order(self, *order: str | int) -> Any:
        """Have the cluster do something: power_off, power_on, cut, heal, processes_of, each with a node's number."""
        assert self.keeper.stdin is not None
        self.keeper.stdin.write(json.dumps(order) + "\n")
        self.keeper.stdin.flush()
        return self._answer()

    def run(self, *command: str | Path, check: bool = True) -> str:
        """What a command says that runs as a user of the cluster would run it."""
        done = subprocess.run(
            [str(word) for word in command],
            env=self.user(),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0 or not check, done.stderr
        return done.stdout

    def user(self) -> dict[str, str]:
        """The environment of a user of the cluster."""
        return {**os.environ, **self.environment}

    def end(self) -> None:
        assert self.keeper.stdin is not None
        self.keeper.stdin.close()
        self.keeper.wait(60)

    def _answer(self) -> Any:
        assert self.keeper.stdout is not None
        line = self.keeper.stdout.readline()
        assert line, f"no Slurm: the keeper has ended; its logs are in {self.folder}/log"
        answer = json.loads(line)
        assert not (isinstance(answer, dict) and "error" in answer), answer
        return answer


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
