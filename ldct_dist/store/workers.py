"""The processes that do an ingest's work. If one is killed, only its own case is lost."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import TypeVar

from ldct_dist.errors import UserError
from ldct_dist.store.processes import kill, pool
from ldct_dist.store.task import Task, make_case

KILLED = "its process was killed, probably because memory ran out; give fewer workers or more memory"
S = TypeVar("S")
T = TypeVar("T")


class Workers:
    """Up to `count` processes, started when there is work for them; a context manager that ends them.

    After an error they first finish the cases that they are working on; after Ctrl-C or TERM they do not.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._processes: Executor | None = None
        self._size = 0

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._processes is not None:
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                kill(self._processes)
            self._end()

    def map(self, function: Callable[[S], T], items: Sequence[S]) -> Iterator[T]:
        """What `function` returns for each item, in order. Raises UserError if a process was killed over one."""
        try:
            yield from self._pool(len(items)).map(function, items)
        except BrokenProcessPool as e:
            raise UserError(f"while headers were read: {KILLED}") from e

    def make(self, tasks: Sequence[Task]) -> Iterator[tuple[Task, str | None]]:
        """Make the cases, in any order; (task, None), or (task, why it was refused).

        If a process is killed, it is not known which of the cases in work was the cause. Each of them is then made in a
        process of its own, and the one whose process is killed again is refused.
        """
        waiting = deque(tasks)
        while waiting:
            in_hand = yield from self._share_out(waiting)
            for task in in_hand:
                yield task, _alone(task)

    def _share_out(self, waiting: deque[Task]) -> Generator[tuple[Task, str | None], None, list[Task]]:
        """Make the `waiting` cases until none is left; returns the tasks in work when a process was killed, if one was."""
        processes = self._pool(len(waiting))
        running: dict[Future[str | None], Task] = {}
        try:
            while waiting or running:
                # One more than there are workers, so that none has to wait for this process.
                while waiting and len(running) <= self._size:
                    future = processes.submit(make_case, waiting[0])
                    running[future] = waiting.popleft()
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    refusal = future.result()
                    yield running.pop(future), refusal
        except BrokenProcessPool:
            self._end()
            return list(running.values())
        return []

    def _pool(self, tasks: int) -> Executor:
        """Processes for so many tasks: at most one each, and those that are there already if they are enough."""
        size = max(1, min(self.count, tasks))
        if self._processes is None or self._size < size:
            self._end()
            self._processes, self._size = pool(size), size
        return self._processes

    def _end(self) -> None:
        if self._processes is not None:
            self._processes.shutdown(cancel_futures=True)
            self._processes = None


def _alone(task: Task) -> str | None:
    with Workers(1) as one:
        try:
            return one._pool(1).submit(make_case, task).result()
        except BrokenProcessPool:
            return f"{task.pair.full.name}: {KILLED}"
