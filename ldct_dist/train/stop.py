"""Asking a run to stop: signals and the time limit only set a flag; the ranks agree at a step boundary."""

from __future__ import annotations

import math
import os
import signal
import time
from types import FrameType

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
UNMEASURED_SAVE_S = 30.0
MARGIN_S = 5.0


class Stop:
    """Knows whether this process is to stop, since it was asked to or since its time limit is near.

    Use it as a context manager: signal handlers are restored at the end. A second SIGINT ends the process at once,
    wherever it is, for a person who does not want to wait for the checkpoint.
    limit_s: seconds from now; None: Slurm's time limit, if there is one. grace_s: seconds between the scheduler's signal
    and the kill.
    """

    def __init__(self, limit_s: float | None = None, grace_s: float = math.inf) -> None:
        self.grace_s = grace_s
        self.deadline = time.time() + limit_s if limit_s is not None else _slurm_deadline()
        self.reason: str | None = None
        self.step_s = self._round_s = 0.0
        """longest time lately between two looks at the flag: a step, or a volume of validation"""
        self.save_s: float | None = None
        """how long saving takes; None until it was measured"""
        self._warned = False
        self._before: dict[signal.Signals, signal._HANDLER] = {}

    def __enter__(self) -> Stop:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def wanted(self) -> bool:
        """Whether to stop now; near a time limit, while a step and twice a save still fit."""
        save = UNMEASURED_SAVE_S if self.save_s is None else self.save_s
        needed = self.step_s + 2 * save + MARGIN_S
        if self.reason is None and self.deadline is not None and time.time() + needed > self.deadline:
            self.reason = "the time limit is near"
        return self.reason is not None

    def note_round(self, seconds: float) -> None:
        """A round of a validation took so long. Later rounds may as well, so it counts from now on."""
        self._round_s = max(self._round_s, seconds)
        self.step_s = max(self.step_s, self._round_s)

    def too_slow(self) -> str | None:
        """A warning, the first time that a save after a signal would come too late for grace_s."""
        needed = self.step_s + (self.save_s or 0.0)
        if needed <= self.grace_s or self._warned:
            return None
        self._warned = True
        return (
            f"a step and a save take {needed:.1f} s, longer than grace_s={self.grace_s:g}: killed that soon after "
            "the signal, the run goes back to its last checkpoint; ask the scheduler for more seconds (Slurm: "
            "--signal=USR1@SECONDS) and set grace_s to them"
        )

    def _note(self, number: int, _: FrameType | None) -> None:
        self.reason = f"{signal.Signals(number).name} arrived"
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # needs no Python: works inside a stuck collective


def _slurm_deadline() -> float | None:
    end = os.environ.get("SLURM_JOB_END_TIME")
    return float(end) if end else None
