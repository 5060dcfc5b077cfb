"""Which checkpoints stay, and how those in a folder are ordered."""

from __future__ import annotations

import math
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import Field

from ldct_dist.checkpoint.manifest import Corrupt, Manifest
from ldct_dist.config import Config, Positive
from ldct_dist.files import TEMPORARY, sync

PREFIX = "step-"
DISCARDED = ".discarded-"


class CheckpointConfig(Config):
    """When a run is saved and what is kept."""

    every: Positive = 500
    """steps between checkpoints"""
    keep_last: int = Field(3, ge=0)
    """newest checkpoints that stay, besides the best one"""
    keep_every: Positive | None = None
    """checkpoints at multiples of this many steps stay for ever"""

    @property
    def newest(self) -> int:
        """How many of the newest stay: at least one, whatever keep_last says."""
        return max(1, self.keep_last)

    def at_most(self, steps: int) -> int:
        """How many exist at once, at most, in a run of so many steps: those of keep_every, the newest, the best, and the
        one being written."""
        forever = steps // math.lcm(self.every, self.keep_every) if self.keep_every else 0
        return forever + self.newest + 2


def directory(root: Path, step: int) -> Path:
    return root / f"{PREFIX}{step:08d}"


def saved(root: Path) -> list[Path]:
    """All folders with the name of a checkpoint, valid or not; a user's copy beside them has another name."""
    return [path for path in root.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]


def newest_first(root: Path) -> tuple[list[tuple[Path, Manifest]], list[tuple[Path, str]]]:
    """(checkpoints, newest first; those whose manifest is damaged or missing, and why).

    They are ordered by generation and position in the data. Only manifests are read: the loader checks the other files.
    """
    sound: list[tuple[Path, Manifest]] = []
    broken: list[tuple[Path, str]] = []
    for path in sorted(saved(root), reverse=True):
        try:
            sound.append((path, Manifest.read(path)))
        except Corrupt as e:
            broken.append((path, str(e)))
    sound.sort(key=lambda c: (c[1].generation, _position(c[1])), reverse=True)
    return sound, broken


def _position(manifest: Manifest) -> int:
    """`TrainState.position`: the one counter that never falls within a start, as steps do at a rollback."""
    return manifest.step + manifest.state.get("moved", 0)


def is_regular(manifest: Manifest, config: CheckpointConfig) -> bool:
    """Whether the checkpoint is of a step on schedule, and not right after a skipped one.

    A rollback goes to the newest of these: a stop saves others, perhaps amid skipped steps, and where a run goes back to
    must not depend on where it was stopped.
    """
    return manifest.step % config.every == 0 and not manifest.state.get("guard", {}).get("stretch")


def prune(root: Path, config: CheckpointConfig) -> None:
    """Delete what the config does not keep, and what unfinished saves and deletions left behind.

    The newest checkpoint and the best by validation always stay. If `keep_last` is 2 or more, the newest regular one is
    among those that it keeps.
    """
    checkpoints, _ = newest_first(root)
    newest = [path for path, _ in checkpoints[: config.newest]]
    regular = [path for path, manifest in checkpoints if is_regular(manifest, config)][:1]
    if len(newest) > 1 and regular and regular[0] not in newest:  # stops have saved all of these
        newest[-1:] = regular
    stay = {best_of(checkpoints), *newest}
    for path, manifest in checkpoints:
        forever = config.keep_every is not None and manifest.step % config.keep_every == 0
        if path not in stay and not forever:
            discard(path)
    for leftover in [*root.glob(f"{TEMPORARY}*"), *root.glob(f"{DISCARDED}*")]:
        shutil.rmtree(leftover, ignore_errors=True)  # another process may be deleting it, too


def best_of(checkpoints: list[tuple[Path, Manifest]]) -> Path | None:
    """The checkpoint with the lowest validation RMSE; None if none was validated. checkpoints: newest first.

    Only those count that were validated on the same basis as the newest validated one: on other cases, or by another
    protocol, an RMSE means something else.
    """
    scored = [(p, m) for p, m in checkpoints if m.state.get("validation") is not None]
    alike = [(m.state["validation"], -m.step, p) for p, m in scored if _basis(m) == _basis(scored[0][1])]
    return min(alike)[2] if alike else None


def _basis(manifest: Manifest) -> Any:
    """What was validated on (`TrainState.basis`); None in manifests of versions that did not record it."""
    return manifest.state.get("basis")


def discard(path: Path) -> None:
    """Delete a checkpoint. It is renamed first, so that a kill in the middle leaves no half of one under its name."""
    shutil.rmtree(_set_aside(path), ignore_errors=True)


def put_in_place(written: Path, target: Path) -> None:
    """Give a checkpoint that is completely written its name.

    One that has the name already is only set aside, for the next `prune` to delete: until the new one is in its place,
    there may be no other.
    """
    aside = _set_aside(target) if target.exists() else None
    try:
        written.rename(target)
    except OSError:
        if aside is not None:
            aside.rename(target)
        raise
    sync(target.parent)


def complete(root: Path) -> None:
    """Give their names to checkpoints that were completely written when a kill came before the rename.

    Do not call it while a save is under way.
    """
    for written in root.glob(f"{TEMPORARY}{PREFIX}*"):
        with suppress(Corrupt):  # not complete: the manifest is written last
            target = directory(root, Manifest.read(written).step)
            if not target.exists():
                put_in_place(written, target)


def _set_aside(path: Path) -> Path:
    aside = path.with_name(f"{DISCARDED}{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    return path.rename(aside)
