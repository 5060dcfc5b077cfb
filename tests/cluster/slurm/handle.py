"""What a process holds of a throw-away cluster, which lives under a keeper of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


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
