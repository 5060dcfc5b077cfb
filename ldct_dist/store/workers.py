"""An ingest's work shared out over processes, of which any may be killed without taking the others' along."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import chain
from pathlib import Path

from numcodecs import blosc

from ldct_dist.ct.headers import Header, read_headers
from ldct_dist.errors import UserError
from ldct_dist.store.task import Task, make_case

KILLED = "its process was killed, most likely for want of memory; give fewer workers or more memory"
_FEW_HEADERS = 1000  # are read sooner than processes start
_BATCH = 32  # headers
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


class Workers:
    """`count` processes, started when there is work worth it; a context manager that ends them."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._headers_asked = 0
        self._processes: Executor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._processes is not None:
            self._processes.shutdown(cancel_futures=True)

    def read_headers(self, paths: Sequence[Path]) -> Iterable[Header | UserError | None]:
        """As `ldct_dist.ct.headers.read_headers`. Raises UserError if a process was killed over it."""
        self._headers_asked += len(paths)
        if self._headers_asked < _FEW_HEADERS:
            return read_headers(paths)
        batches = [paths[i : i + _BATCH] for i in range(0, len(paths), _BATCH)]
        try:
            return list(chain.from_iterable(self._pool().map(read_headers, batches)))
        except BrokenProcessPool as e:
            raise UserError(f"{paths[0].parent}: while its headers were read, {KILLED}") from e

    def make(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, str | None]]:
        """Make each case, in no certain order; each task with None, or with why it was refused.

        When a process is killed, which of the cases then in hand was to blame is unknown: each gets a process
        to itself, and the one that breaks that too is refused.
        """
        waiting = deque(tasks)
        while waiting:
            in_hand = yield from self._share_out(waiting)
            for task in in_hand:
                yield task, _alone(task)

    def _share_out(self, waiting: deque[Task]) -> Generator[tuple[Task, str | None], None, list[Task]]:
        """Work `waiting` off; the tasks that were in hand when a process was killed, if one was."""
        running: dict[Future[str | None], Task] = {}
        try:
            while waiting or running:
                while waiting and len(running) <= self.count:  # one more, so that none waits for this process
                    future = self._pool().submit(make_case, waiting[0])
                    running[future] = waiting.popleft()
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    refusal = future.result()
                    yield running.pop(future), refusal
        except BrokenProcessPool:
            self._pool().shutdown()
            self._processes = None
            return list(running.values())
        return []

    def _pool(self) -> Executor:
        if self._processes is None:
            self._processes = pool(self.count)
        return self._processes


def pool(workers: int) -> Executor:
    # Not fork: the parent has threads (torch's) that a forked child would wait for for ever.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare)


def _alone(task: Task) -> str | None:
    with pool(1) as process:
        try:
            return process.submit(make_case, task).result()
        except BrokenProcessPool:
            return f"{task.pair.full.name}: {KILLED}"


def _prepare() -> None:
    _keep_memory()
    blosc.use_threads = False
    os.environ["OMP_NUM_THREADS"] = "1"  # for torch, which is imported when low dose is simulated
    if "torch" in sys.modules:  # the calling script imports it
        sys.modules["torch"].set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends the pool
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _keep_memory() -> None:
    """Volumes of one case after the other lie in the same memory: to take it anew each time, from glibc's default of
    giving back what is large, costs a tenth of the work."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # the most that it takes
        libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def _end_with_parent() -> None:
    """A parent that was killed cannot end its pool, and a worker that lives on would write into the store
    beside those of the next start."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
