"""Asking a run to stop: signals and the time limit only set a flag; the ranks agree at a step boundary."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)


class Stop:
    """True once this process was asked to stop, or once its time limit is near.

    A context manager: the handlers that stood before are put back at the end. A second SIGINT raises
    KeyboardInterrupt at once, for a person who does not want to wait for the checkpoint.
    """

    def __init__(self, deadline: float | None = None) -> None:
        self.deadline = deadline if deadline is not None else _slurm_deadline()
        self.reason: str | None = None
        self._before: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> Stop:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def wanted(self, seconds_needed: float) -> bool:
        """Whether to stop now, given how long saving and one more step may take."""
        if self.reason is None and self.deadline is not None and time.time() + seconds_needed > self.deadline:
            self.reason = "the time limit is near"
        return self.reason is not None

    def _note(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.reason is not None:
            raise KeyboardInterrupt
        self.reason = f"{signal.Signals(number).name} arrived"


def _slurm_deadline() -> float | None:
    end = os.environ.get("SLURM_JOB_END_TIME")
    return float(end) if end else None
