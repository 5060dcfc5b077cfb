"""What a person and TensorBoard see of a run; rank 0 alone writes."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TextIO

import numpy as np

from ldct_dist.ct.volume import Volume
from ldct_dist.errors import few
from ldct_dist.evaluate.protocols import protocol_named
from ldct_dist.files import replacing
from ldct_dist.train.board import Board
from ldct_dist.train.config import RunConfig
from ldct_dist.train.cost.usage import Usage
from ldct_dist.train.run import RunFolder
from ldct_dist.train.validation import Validated
from ldct_dist.world import World

PICTURES = 50  # of a run: half a MiB each, and all are read by TensorBoard, which shows ten
# The last may lack its end after a kill; after a power cut, zeros may have taken the place of two lines' middle.
_LOSS_LINE = re.compile(rb'(\{"step": (\d+)\b[^{}\x00-\x1f]*\})\n?')


@dataclass(frozen=True)
class StepFigures:
    """One step, over the whole global batch. loss in HU (HU^2 for mse); wait_s: of its seconds, those without data."""

    step: int
    loss: float
    lr: float
    grad_norm: float
    applied: bool
    """False where the step was skipped: it changed nothing"""
    wait_s: float
    seconds: float


class Mute:
    """The monitor of every rank but rank 0: it takes the same calls and does nothing."""

    def rewind(self, step: int) -> None:
        """The run goes on from `step`: what was written of later steps is to be taken back."""

    def step(self, figures: StepFigures) -> None: ...

    def validation(self, step: int, done: Validated) -> None: ...

    def close(self) -> None: ...

    def __enter__(self) -> Mute:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Monitor(Mute):
    """losses.jsonl (every step, exact), TensorBoard and the progress line; `rewind` opens it.

    On resume, what was written after the checkpoint is taken back, so that the curve has each step once.
    """

    def __init__(self, folder: RunFolder, config: RunConfig, world: World) -> None:
        self.usage = Usage(config, world)
        self.folder, self.total, self.batch = folder, config.steps, config.data.batch
        self.every, self.images = config.log.every, config.log.images
        self.validates_every = config.validation.every
        self.protocol = protocol_named(config.validation.protocol)
        self._losses: TextIO | None = None
        self._warned = False

    def rewind(self, step: int) -> None:
        self.close()
        _drop_losses_after(self.folder, step)
        self._board = Board(self.folder.tensorboard, kept=step)
        self._losses = open(self.folder.losses, "a", buffering=1)  # noqa: SIM115  closed in close()
        self._since: list[StepFigures] = []
        self._start, self._first = time.monotonic(), step

    def step(self, figures: StepFigures) -> None:
        assert self._losses is not None
        line = {k: v for k, v in asdict(figures).items() if k not in ("wait_s", "seconds")}
        line |= {"loss": _finite(figures.loss), "grad_norm": _finite(figures.grad_norm)}
        with self._whatever_the_disk():
            self._losses.write(json.dumps(line) + "\n")  # what does not fit stays in the buffer until it does
        self._since.append(figures)
        if figures.step % self.every == 0 or figures.step == self.total:
            self._report()

    def validation(self, step: int, done: Validated) -> None:
        protocol = self.protocol
        with self._whatever_the_disk(), self._board.writing() as board:
            for name, value in done.figures.items():
                board.add_scalar(f"validation/{name} ({protocol.name})", value, step)
            board.flush()  # before the save that says it need not be measured again
        told = "  ".join(f"{k} {v:.4g}" for k, v in done.figures.items())
        if done.failed:
            told += f"  {few(done.failed, ', ')}: the network's answer is not finite"
        took = timedelta(seconds=round(done.seconds))
        self._say(f"validation   {told}   [{protocol.name}]   cases {done.basis['cases']} in {took}")
        if done.first is not None and self._shows(step):
            self._image(step, done.first, protocol.window)

    def close(self) -> None:
        if self._losses is not None:
            with self._whatever_the_disk():
                self._losses.close()
            with self._whatever_the_disk():
                self._board.close()

    @contextmanager
    def _whatever_the_disk(self) -> Iterator[None]:
        """A full disk costs figures, and one line that says so. Training goes on: the weights are in memory."""
        try:
            yield
        except OSError as e:
            if not self._warned:
                self._say(
                    f"warning: {self.folder.path}: figures cannot be written ({e.strerror or e}); training goes on"
                )
            self._warned = True

    def _shows(self, step: int) -> bool:
        """Whether the validation after this step has a picture: the first, the last, and at most PICTURES in between."""
        apart = -(-self.total // (self.validates_every * PICTURES))
        is_last = step + self.validates_every > self.total
        return self.images and (is_last or (step // self.validates_every - 1) % apart == 0)

    def _image(self, step: int, images: dict[str, Volume], window: tuple[float, float]) -> None:
        """Three planes of each image, and of the difference of the last two, in a window of HU."""
        from ldct_dist.evaluate.figures import planes_strip  # its imports cost a second, for this rank alone

        picture = planes_strip(images, window)
        with self._whatever_the_disk(), self._board.writing() as board:
            board.add_image("validation/" + ", ".join([*images, "difference"]), picture, step)

    def _say(self, line: str) -> None:
        print(line, flush=True)

    def _report(self) -> None:
        since, self._since = self._since, []
        seconds = sum(f.seconds for f in since)
        last = since[-1]
        loss = float(np.mean([f.loss for f in since if f.applied] or [math.nan]))
        wait = 100 * sum(f.wait_s for f in since) / seconds
        rate = len(since) * self.batch / seconds
        scalars = {  # TensorBoard sorts by name: how a run learns comes before how it works
            "train/loss": loss,
            "train/lr": last.lr,
            "train/grad_norm": last.grad_norm,
            "workload/crops_per_s": rate,
            "workload/data_wait_percent": wait,
            **self.usage.scalars(len(since), seconds),
        }
        mfu = f"MFU {scalars['workload/mfu_percent']:4.1f} %   " if "workload/mfu_percent" in scalars else ""
        with self._whatever_the_disk(), self._board.writing() as board:
            for name, value in scalars.items():
                board.add_scalar(name, value, last.step)
            board.flush()
        done = last.step - self._first
        eta = (time.monotonic() - self._start) / done * (self.total - last.step)
        self._say(
            f"step {last.step:>{len(str(self.total))}}/{self.total}   loss {loss:8.3f}   lr {last.lr:.2e}   "
            f"{rate:6.1f} crops/s   {mfu}data wait {wait:4.1f} %   ETA {timedelta(seconds=round(eta))}"
        )


def _finite(value: float) -> float | None:
    """JSON knows no other numbers."""
    return value if math.isfinite(value) else None


def _drop_losses_after(folder: RunFolder, last_step: int) -> None:
    """Keep the loss lines up to `last_step`, that of the checkpoint: later steps are done again. Damaged ones go.

    Line by line, and without JSON: after a million steps there are 120 MB of them, and all ranks wait.
    """
    if not folder.losses.exists():
        return
    with (
        open(folder.losses, "rb") as lines,
        replacing(folder.losses) as temporary,
        open(temporary, "wb") as kept,
    ):
        for line in lines:
            whole = _LOSS_LINE.fullmatch(line)
            if whole and int(whole[2]) <= last_step:
                kept.write(whole[1] + b"\n")
