"""Saving beside training: stage this rank's share, write it, and commit all shares or none.

A checkpoint is a set of named parts, the same on every rank; each part is one safetensors file, written
by one rank. The directory appears under its name only when every file and the manifest are on disk.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from ldct_dist.checkpoint import generation as generations
from ldct_dist.checkpoint import retention
from ldct_dist.checkpoint.manifest import Manifest, file_sha256, sync_directory
from ldct_dist.checkpoint.retention import CheckpointConfig
from ldct_dist.models.weights import sealed
from ldct_dist.world import World

LOOK_S = 1.0
"""between two looks at the claims of other starts"""


@dataclass(frozen=True)
class Part:
    """One file of a checkpoint: tensors by name, and facts that stand in the file's own header."""

    tensors: dict[str, torch.Tensor]
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


@dataclass(frozen=True)
class Outcome:
    """How a save ended: the committed path, or why there is none."""

    path: Path | None
    seconds: float
    error: str | None = None
    fenced: bool = False


class Saver:
    """Writes checkpoints of one generation into `root`, one at a time, on a thread of its own.

    The training thread calls `save`, then `staged` before it next changes a tensor of the state, and
    `finish` when it needs the outcome. Memory: one copy of what this rank writes, from the first save on.
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

    def save(self, step: int, parts: dict[str, Part], state: dict[str, Any]) -> None:
        """Start saving; returns at once unless the save before it is still being written.

        parts: the same names on every rank; a part's tensors may be changed only after `staged`.
        state: what the manifest carries in JSON.
        """
        self.finish()
        self._copied.clear()
        self._thread = threading.Thread(target=self._run, args=(step, parts, state), name="checkpoint")
        self._thread.start()

    def staged(self) -> None:
        """Wait until the tensors handed to `save` have been copied: call before changing them."""
        self._copied.wait()

    def finish(self) -> Outcome | None:
        """Wait for the save under way, if any, and tell how the latest one ended.

        A bug in the save is raised here: a run must not go on, or end well, that cannot save.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._bug is not None:
            raise self._bug
        return self.last

    def has_saved(self) -> bool:
        return self.last is not None and self.last.path is not None

    @property
    def fenced(self) -> bool:
        """Whether a newer start of the run has taken over: known on rank 0, at most a second late.

        A process that was stopped, or cut off, learns of it before it has done another step.
        """
        if self.world.is_main and not self._superseded and time.monotonic() > self._looked + LOOK_S:
            self._looked = time.monotonic()
            with suppress(OSError):  # a file system that does not answer says nothing; a save would tell
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
        temporary = self.root / f"{retention.TEMPORARY}{target.name}-{self.generation:06d}"
        mine: dict[str, Part] = {}

        def stage() -> None:
            try:
                mine.update(self._stage(parts))
            finally:
                self._copied.set()

        def prepare() -> None:
            if self.world.is_main:
                generations.check(self.claims, self.generation)
                self.root.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()

        def write() -> dict[str, tuple[int, str]]:
            return {name: _write(temporary / name, part) for name, part in mine.items()}

        def commit() -> None:
            if self.world.is_main:
                files = {name: entry for share in shares for name, entry in share.items()}
                Manifest(self.generation, step, files, state).write(temporary)
                generations.check(self.claims, self.generation)
                if target.exists():  # a checkpoint that this generation passed over, or outranks
                    retention.discard(target)
                temporary.rename(target)
                sync_directory(self.root)
                retention.prune(self.root, self.config)

        try:
            self._together(stage)
            self._together(prepare)
            shares = self._together(write)
            self._together(commit)
            self.last = Outcome(target, time.monotonic() - start)
        except _Failed as e:
            if self.world.is_main:
                shutil.rmtree(temporary, ignore_errors=True)  # the next save must find its place free
            self.last = Outcome(None, time.monotonic() - start, error=str(e), fenced=e.fenced)

    def _stage(self, parts: dict[str, Part]) -> dict[str, Part]:
        """Copies of the parts that this rank writes, in memory kept from save to save: to take it anew each time
        costs more than the copying."""
        owner = share_out(parts, self.world.size)
        mine = {name: part for name, part in parts.items() if owner[name] == self.world.rank}
        before, self._memory = self._memory, {}
        for name, part in mine.items():
            for key, tensor in part.tensors.items():
                place = before.pop((name, key), None)
                if place is None or (place.shape, place.dtype) != (tensor.shape, tensor.dtype):
                    place = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._memory[name, key] = place.copy_(tensor.detach())
        return {
            name: Part({key: self._memory[name, key] for key in part.tensors}, part.facts)
            for name, part in mine.items()
        }

    def _together(self, phase: Callable[[], Any]) -> list[Any]:
        """Run a phase on every rank; all ranks get all results, or all raise _Failed."""
        result, error, fenced = None, None, False
        try:
            result = phase()
        except generations.Fenced as e:
            error, fenced = str(e), True
        except (OSError, SafetensorError, RuntimeError, ValueError, MemoryError) as e:
            error = f"{self.world.name}: {e}"
        answers = self.world.gather((result, error, fenced), self._group)
        errors = [e for _, e, _ in answers if e is not None]
        if errors:
            raise _Failed("; ".join(errors), any(f for _, _, f in answers))
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


def _write(path: Path, part: Part) -> tuple[int, str]:
    """Write one file to disk for good; its size and sha256."""
    save_file(part.tensors, path, metadata=sealed(part.facts, part.tensors) if part.facts else None)
    with open(path, "rb") as f:
        os.fsync(f.fileno())
    return path.stat().st_size, file_sha256(path)
