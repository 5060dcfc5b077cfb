"""TensorBoard's writer on disks that may be full for a while."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter


class Board:
    """A run's TensorBoard file; close it. kept: figures of later steps, from an earlier start, are no longer valid.

    TensorBoard writes in a thread of its own. At the first failure that thread prints a traceback and ends, and every
    later call raises the error again. Here the thread ends in silence, and once a call has raised the error the next one
    begins a new file.
    """

    def __init__(self, folder: Path, kept: int) -> None:
        self.folder = folder
        self._writer: SummaryWriter | None = SummaryWriter(str(folder), purge_step=kept + 1, flush_secs=10)
        self._lost = False
        self._told_before = threading.excepthook
        threading.excepthook = self._hear

    @contextmanager
    def writing(self) -> Iterator[SummaryWriter]:
        """For what is written in the block; a failure to write it raises OSError here, or from a later call."""
        if self._writer is None:
            self._writer = SummaryWriter(str(self.folder), flush_secs=10)
        try:
            yield self._writer
        except OSError:
            lost, self._writer, self._lost = self._writer, None, True
            with suppress(OSError):
                lost.close()
            raise

    def close(self) -> None:
        """Write what is still to be written. Raises OSError if that fails."""
        if self._writer is not None:
            self._writer.close()
        if not self._lost:  # else the thread that failed may still be about to call the hook
            threading.excepthook = self._told_before

    def _hear(self, failed: threading.ExceptHookArgs) -> None:
        ours = type(failed.thread).__module__.startswith("tensorboard.")
        if not (ours and isinstance(failed.exc_value, OSError)):
            self._told_before(failed)
