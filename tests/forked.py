"""Training runs in real processes that do not each import torch anew: forked from one that has."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

_FORK = multiprocessing.get_context("forkserver")
_PRELOAD = ["ldct_dist.train.trainer", "ldct_dist.cli", "torch._dynamo", "forked"]

Plant = Callable[[int], None]


def fork(config: Path, *overrides: str, ranks: int = 2, plant: Plant | None = None) -> list[int]:
    """Train to the end or whatever comes before it; exit codes. What is printed is added to CONFIG.log."""
    with ForkedRanks(config, *overrides, ranks=ranks, plant=plant) as running:
        return running.wait()


class ForkedRanks:
    """`ranks` processes that each do what `ldct-dist train` does; as a context manager it leaves none behind.

    plant: a module's function that each process calls with its rank before anything else, to plant a fault.
    """

    def __init__(self, config: Path, *overrides: str, ranks: int = 2, plant: Plant | None = None) -> None:
        _FORK.set_forkserver_preload(_PRELOAD)  # each time: an ingest in this process sets its own
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.processes = [
            _FORK.Process(target=_main, args=(rank, ranks, port, config, overrides, plant))
            for rank in range(ranks)
        ]
        for process in self.processes:
            process.start()

    def signal(self, number: signal.Signals, *ranks: int) -> None:
        for rank in ranks or range(len(self.processes)):
            os.kill(self.processes[rank].pid, number)

    def wait(self, *ranks: int) -> list[int]:
        """Exit codes of these ranks, or of all, once they have ended."""
        waited = [self.processes[rank] for rank in ranks or range(len(self.processes))]
        for process in waited:
            process.join(600)
        return [process.exitcode for process in waited]

    def wait_until(self, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not ready():
            assert all(p.is_alive() for p in self.processes), "training ended too early"
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def __enter__(self) -> ForkedRanks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _main(
    rank: int, ranks: int, port: int, config: Path, overrides: Sequence[str], plant: Plant | None
) -> None:
    from ldct_dist import cli

    out = os.open(config.with_suffix(".log"), os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ |= {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"},
        **{"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_PORT": str(port)},
    }
    if plant is not None:
        plant(rank)
    sys.argv = ["ldct-dist", "train", str(config), *overrides]
    cli.main()
