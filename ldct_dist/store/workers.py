"""Tasks shared out over processes, of which any may be killed without taking the others' work along."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

import torch

from ldct_dist.store.task import Task, make_case

KILLED = "its process was killed, most likely for want of memory; give fewer workers or more memory"


def run_all(tasks: Iterable[Task], workers: int) -> Iterator[tuple[Task, str | None]]:
    """Make each case, in no certain order; each task with None, or with why it was refused.

    When a process is killed, which of the cases then in hand was to blame is unknown: each gets a process
    to itself, and the one that breaks that too is refused.
    """
    waiting = deque(tasks)
    while waiting:
        in_hand = yield from _share_out(waiting, workers)
        for task in in_hand:
            yield task, _alone(task)


def pool(workers: int) -> Executor:
    # Not fork: the parent has threads (torch's) that a forked child would wait for for ever.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare)


def _share_out(waiting: deque[Task], workers: int) -> Generator[tuple[Task, str | None], None, list[Task]]:
    """Work `waiting` off; the tasks that were in hand when a process was killed, if one was."""
    running: dict[Future[str | None], Task] = {}
    with pool(min(workers, len(waiting))) as processes:
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    future = processes.submit(make_case, waiting[0])
                    running[future] = waiting.popleft()
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    refusal = future.result()
                    yield running.pop(future), refusal
        except BrokenProcessPool:
            return list(running.values())
    return []


def _alone(task: Task) -> str | None:
    with pool(1) as process:
        try:
            return process.submit(make_case, task).result()
        except BrokenProcessPool:
            return f"{task.pair.full.name}: {KILLED}"


def _prepare() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends the pool
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that was killed cannot end its pool, and a worker that lives on would write into the store
    beside those of the next start."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
