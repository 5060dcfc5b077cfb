"""Streams that know what they have waited for, as vector clocks: who uses what is not ready is told."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Race(Exception):
    """A stream uses what another one may not have made yet, or may give away."""


LOCK = threading.RLock()
_current = threading.local()


class Stream:
    def __init__(self, device: object = None) -> None:
        self.done = 0
        """operations so far"""
        self.seen: dict[Stream, int] = {}
        """of other streams, how many operations this one has waited for"""
        self.arriving: list[Callable[[], object]] = []
        """asynchronous copies to the CPU"""

    def record_event(self) -> Event:
        with LOCK:
            return Event(self, self.done, dict(self.seen), list(self.arriving))

    def wait_event(self, event: Event) -> None:
        with LOCK:
            for stream, done in [*event.seen.items(), (event.stream, event.done)]:
                self.seen[stream] = max(self.seen.get(stream, 0), done)

    def synchronize(self) -> None:
        self.record_event().synchronize()


class Event:
    def __init__(self, stream: Stream, done: int, seen: dict[Stream, int], arriving: list[Callable]) -> None:
        self.stream, self.done, self.seen, self._arriving = stream, done, seen, arriving

    def synchronize(self) -> None:
        for arrive in self._arriving:
            arrive()


class Allocated:
    """Bytes, in the allocator's blocks of 512."""

    now = peak = 0

    @classmethod
    def change(cls, nbytes: int) -> None:
        with LOCK:
            cls.now += nbytes
            cls.peak = max(cls.peak, cls.now)


class Memory:
    """What several views share: which stream wrote it last, and which streams may use it."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = -(-nbytes // 512) * 512
        self.stream = current_stream()
        self.written = 0
        self.known = {self.stream}
        Allocated.change(self.nbytes)
        weakref.finalize(self, Allocated.change, -self.nbytes)

    def used(self, what: str) -> None:
        """Raises Race unless the current stream may."""
        stream = current_stream()
        if stream is not self.stream and stream.seen.get(self.stream, 0) < self.written:
            raise Race(f"{what}: a stream uses a tensor that it has not waited for")
        if stream not in self.known:
            raise Race(f"{what}: a stream uses a tensor whose memory is not kept for it (record_stream)")

    def __deepcopy__(self, memo: dict) -> Memory:
        copied = Memory(self.nbytes)
        copied.wrote()
        return copied

    def wrote(self) -> None:
        self.stream = current_stream()
        self.stream.done += 1
        self.written = self.stream.done


DEFAULT = Stream()


def current_stream(device: object = None) -> Stream:
    return getattr(_current, "stream", DEFAULT)


@contextmanager
def stream(chosen: Stream) -> Iterator[None]:
    before, _current.stream = current_stream(), chosen
    try:
        yield
    finally:
        _current.stream = before
