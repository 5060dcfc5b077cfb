"""Several ranks on this machine, without a scheduler."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

import torch

GRACE_S = 10.0


def ranks_here() -> int:
    """How many ranks to start on this machine: one for each GPU, or two on a CPU."""
    return torch.cuda.device_count() or 2


class LocalRanks:
    """Starts `ranks` processes of `ldct-dist ARGUMENTS`, in a process group of their own.

    If one fails, the others get a SIGTERM, since they would wait for it in the next collective, and after GRACE_S a
    SIGKILL, since a stopped process does not react. Leaving the context manager kills all that are left.
    """

    def __init__(self, arguments: Sequence[str], ranks: int, log: Path | None = None) -> None:
        self.processes: list[subprocess.Popen] = []
        port = str(_free_port())
        out: IO | None = open(log, "ab") if log is not None else None  # noqa: SIM115  handed to the processes
        try:
            for rank in range(ranks):
                self.processes.append(self._start(arguments, rank, ranks, port, out))
        except BaseException:
            self.signal(signal.SIGKILL)
            raise
        finally:
            if out is not None:
                out.close()

    def _start(
        self, arguments: Sequence[str], rank: int, ranks: int, port: str, out: IO | None
    ) -> subprocess.Popen:
        launcher = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        return subprocess.Popen(
            [sys.executable, "-m", "ldct_dist", *arguments],
            env={**os.environ, **launcher},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            process_group=self.processes[0].pid if self.processes else 0,
            preexec_fn=_end_with_parent,
        )

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to every process of the group."""
        if any(p.poll() is None for p in self.processes):
            os.killpg(self.processes[0].pid, number)

    def poll(self) -> int | None:
        """The exit code of the first process that ended; None while all run."""
        return next((code for p in self.processes if (code := p.poll()) is not None), None)

    def wait(self) -> int:
        """The first exit code that is not 0, or 0, once all have ended."""
        code, kill_at = 0, math.inf
        waiting = list(self.processes)
        while waiting:
            if time.monotonic() > kill_at:
                self.signal(signal.SIGKILL)
            for process in list(waiting):
                try:
                    ended = process.wait(timeout=0.1)
                except subprocess.TimeoutExpired:
                    continue
                waiting.remove(process)
                if ended != 0 and code == 0:
                    code = ended
                    if ended not in (0, 75):  # 75: all ranks have agreed to stop, and are saving
                        self.signal(signal.SIGTERM)
                        kill_at = time.monotonic() + GRACE_S
        return code

    def __enter__(self) -> LocalRanks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.signal(signal.SIGKILL)
        for process in self.processes:
            process.wait()


_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1


def _end_with_parent() -> None:
    """In the child: have the kernel kill it when the launcher dies, however that is, so that no rank is left behind."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
