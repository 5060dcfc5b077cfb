"""TensorBoard's writer on disks that may be full for a while."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter


class Board:
    """The figures of a run; close it. kept: the last step of which what was written holds.

    TensorBoard writes in a thread, which ends at the first failure with a traceback of its own; later calls raise it
    again. Here they raise it alone, and the next call after that begins a new file.
    """

    def __init__(self, folder: Path, kept: int) -> None:
        self.folder = folder
        self._writer: SummaryWriter | None = SummaryWriter(str(folder), purge_step=kept + 1, flush_secs=10)
        self._lost = False
        self._told_before = threading.excepthook
        threading.excepthook = self._hear

    @contextmanager
    def writing(self) -> Iterator[SummaryWriter]:
        """What is written within may raise OSError, then or at a later call."""
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
        """Raises OSError if what is still to be written cannot be."""
        if self._writer is not None:
            self._writer.close()
        if not self._lost:  # else its thread may have yet to tell of its end
            threading.excepthook = self._told_before

    def _hear(self, failed: threading.ExceptHookArgs) -> None:
        ours = type(failed.thread).__module__.startswith("tensorboard.")
        if not (ours and isinstance(failed.exc_value, OSError)):
            self._told_before(failed)
