"""Saving beside training: stage this rank's share, write it, and commit all shares or none.

A checkpoint is a set of named parts, the same on every rank; each part is one safetensors file, written
by one rank, whichever ranks hold its tensors. The directory appears under its name only when every file
and the manifest are on disk.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ldct_dist.checkpoint import generation as generations
from ldct_dist.checkpoint import pieces, retention
from ldct_dist.checkpoint.manifest import Manifest
from ldct_dist.checkpoint.pieces import Held, Part, Piece
from ldct_dist.checkpoint.retention import CheckpointConfig
from ldct_dist.errors import few
from ldct_dist.files import TEMPORARY
from ldct_dist.world import World

LOOK_S = 1.0
"""seconds between two looks at the claims of other starts"""


@dataclass(frozen=True)
class Outcome:
    """How a save ended. path: the committed checkpoint, None where `error` says why there is none. fenced: whether a
    newer start has taken over. warning: on rank 0, what else went wrong."""

    path: Path | None
    seconds: float
    error: str | None = None
    fenced: bool = False
    warning: str | None = None


class Saver:
    """Writes checkpoints of one generation into `root`, one at a time, on a thread of its own.

    The training thread calls `save`, then `staged` before it next changes a tensor of the state, and `finish` when it
    needs the outcome. From the first save on, it keeps the memory for one copy of what this rank saves, except for
    pieces that bring their own room.
    """

    def __init__(
        self, root: Path, claims: Path, generation: int, config: CheckpointConfig, world: World
    ) -> None:
        self.root, self.claims, self.generation = root, claims, generation
        self.config, self.world = config, world
        self._group = world.group()
        self._thread: threading.Thread | None = None
        self._copied = threading.Event()
        self._copied.set()
        self._memory: dict[tuple[str, str], torch.Tensor] = {}
        self._bug: BaseException | None = None
        self._superseded, self._looked = False, time.monotonic()
        self.last: Outcome | None = None
        self._has_saved = False

    def save(self, step: int, parts: dict[str, Part], state: dict[str, Any]) -> None:
        """Start saving, and return at once, unless an earlier save is still being written.

        parts: the same names on every rank; a part's tensors may be changed only after `staged`.
        state: for the manifest, as JSON.
        """
        self.finish()
        self._copied.clear()
        self._thread = threading.Thread(target=self._run, args=(step, parts, state), name="checkpoint")
        self._thread.start()

    def staged(self) -> None:
        """Wait until the tensors handed to `save` have been copied: call before changing them."""
        self._copied.wait()

    def finish(self) -> Outcome | None:
        """Wait for the save under way, if there is one; how the latest save ended, None if there was none.

        A bug in saving is raised here: a run that cannot save must neither go on nor count as done.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._bug is not None:
            raise self._bug
        return self.last

    def has_saved(self) -> bool:
        """Whether any save of this start has been committed, whatever became of later ones."""
        return self._has_saved

    @property
    def fenced(self) -> bool:
        """Whether a newer start of the run has taken over. Only rank 0 knows, at most LOOK_S late.

        A process that was stopped, or cut off, learns of it before it has done another step.
        """
        if self.world.is_main and not self._superseded and time.monotonic() > self._looked + LOOK_S:
            self._looked = time.monotonic()
            with suppress(OSError):  # if the file system does not answer, the next save will find out
                self._superseded = generations.newest(self.claims) > self.generation
        return self._superseded

    def _run(self, *given: Any) -> None:
        try:
            self._save(*given)
        except BaseException as e:  # noqa: BLE001  finish() raises it
            self._bug = e
        finally:
            self._copied.set()

    def _save(self, step: int, parts: dict[str, Part], state: dict[str, Any]) -> None:
        start = time.monotonic()
        target = retention.directory(self.root, step)
        temporary = self.root / f"{TEMPORARY}{target.name}-{self.generation:06d}"
        owner = share_out(parts, self.world.size)
        held: Held = {}

        def stage() -> None:
            try:
                held.update(self._stage(parts, owner))
            finally:
                self._copied.set()

        def prepare() -> None:
            if self.world.is_main:
                generations.check(self.claims, self.generation)
                self.root.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()

        def write() -> dict[str, tuple[int, str]]:
            return pieces.write(temporary, parts, owner, held, self.world, self._group)

        def commit() -> None:
            if self.world.is_main:
                files = {name: entry for share in shares for name, entry in share.items()}
                Manifest(self.generation, step, files, state).write(temporary)
                generations.check(self.claims, self.generation)
                retention.put_in_place(temporary, target)

        try:
            self._together(stage)
            self._together(prepare)
            shares = self._together(write)
            self._together(commit)
            self._has_saved = True
            warning = self.prune()
            self.last = Outcome(target, time.monotonic() - start, warning=warning)
        except _Failed as e:
            if self.world.is_main:
                shutil.rmtree(temporary, ignore_errors=True)  # the next save must find its place free
            self.last = Outcome(None, time.monotonic() - start, error=str(e), fenced=e.fenced)

    def prune(self) -> str | None:
        """On rank 0, delete what need not stay, and what killed saves have left; what went wrong, if anything did.

        Do not call it while a save is under way.
        """
        try:
            if self.world.is_main:
                generations.check(self.claims, self.generation)
                retention.prune(self.root, self.config)
        except (OSError, generations.Fenced) as e:
            return f"old checkpoints could not be deleted: {e}"
        return None

    def _stage(self, parts: dict[str, Part], owner: dict[str, int]) -> Held:
        """Copies of this rank's pieces of the parts, in memory that is kept from save to save: to allocate it each time
        costs more than the copying."""
        before, self._memory = self._memory, {}
        held: Held = {name: {} for name in parts}
        for name, part in parts.items():
            for key, tensor in part.tensors.items():
                if isinstance(tensor, Piece):
                    shape, start, values, place = tensor.shape, tensor.start, tensor.values, tensor.room
                elif owner[name] == self.world.rank:
                    shape, start, values, place = tensor.shape, 0, tensor, None
                else:
                    continue
                if place is None:
                    place = before.pop((name, key), None)
                    if place is None or (place.shape, place.dtype) != (values.shape, values.dtype):
                        # Not pinned: pinned memory comes in powers of two, up to twice what is planned for a node.
                        place = torch.empty(values.shape, dtype=values.dtype)
                    self._memory[name, key] = place
                # By way of cpu(): where layouts differ, copy_ would first make another copy on the GPU.
                held[name][key] = Piece(tuple(shape), start, place.copy_(values.detach().cpu()).view(-1))
        return held

    def _together(self, phase: Callable[[], Any]) -> list[Any]:
        """Run a phase on every rank; either all ranks get the results of all, or all raise _Failed."""
        result, error, fenced = None, None, False
        try:
            result = phase()
        except generations.Fenced as e:
            error, fenced = str(e), True
        except (OSError, RuntimeError, ValueError, MemoryError) as e:
            error = f"{self.world.name}: {e}"
        answers = self.world.gather((result, error, fenced), self._group)
        errors = [e for _, e, _ in answers if e is not None]
        if errors:
            raise _Failed(few(errors), any(f for _, _, f in answers))
        return [r for r, _, _ in answers]


class _Failed(Exception):
    def __init__(self, message: str, fenced: bool) -> None:
        super().__init__(message)
        self.fenced = fenced


def share_out(parts: dict[str, Part], ranks: int) -> dict[str, int]:
    """Which rank writes which part: largest first, each to the rank with least to write so far."""
    load = [0] * ranks
    owner = {}
    for name, part in sorted(parts.items(), key=lambda p: (-p[1].nbytes, p[0])):
        rank = load.index(min(load))
        owner[name] = rank
        load[rank] += part.nbytes
    return owner
