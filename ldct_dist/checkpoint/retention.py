"""Which checkpoints stay, and how those in a folder are ordered."""

from __future__ import annotations

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
        """How many of the newest stay: the very newest does in any case."""
        return max(1, self.keep_last)

    @property
    def at_a_time(self) -> int:
        """How many there are at most, besides those of keep_every: the newest, the best, and the one being written."""
        return self.newest + 2


def directory(root: Path, step: int) -> Path:
    return root / f"{PREFIX}{step:08d}"


def saved(root: Path) -> list[Path]:
    """All that bears a checkpoint's name, sound or not; a user's copy beside them has another."""
    return [path for path in root.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]


def newest_first(root: Path) -> tuple[list[tuple[Path, Manifest]], list[tuple[Path, str]]]:
    """(checkpoints by generation and place in the data, newest first; those with no sound manifest, and why).

    Only manifests are read: whether the files behind them are whole is for the loader to check.
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
    """As in TrainState: of all that a start counts, it alone never falls. A run that went back passes steps again."""
    return manifest.step + manifest.state.get("moved", 0)


def is_regular(manifest: Manifest, config: CheckpointConfig) -> bool:
    """Whether it is one of those that a run goes back to from steps that were skipped: a stop makes others, maybe
    within such steps, and where a run goes back to is not to depend on stops."""
    return manifest.step % config.every == 0 and not manifest.state.get("guard", {}).get("stretch")


def prune(root: Path, config: CheckpointConfig) -> None:
    """Delete what the config does not keep, and what unfinished saves and deletions left behind.

    The newest checkpoint stays whatever the config says, and so does the best by validation. Among those that
    `keep_last` keeps, if more than one, is always the newest regular one.
    """
    checkpoints, _ = newest_first(root)
    newest = [path for path, _ in checkpoints[: config.newest]]
    regular = [path for path, manifest in checkpoints if is_regular(manifest, config)][:1]
    if len(newest) > 1 and regular and regular[0] not in newest:  # stops made all of these
        newest[-1:] = regular
    stay = {best_of(checkpoints), *newest}
    for path, manifest in checkpoints:
        forever = config.keep_every is not None and manifest.step % config.keep_every == 0
        if path not in stay and not forever:
            discard(path)
    for leftover in [*root.glob(f"{TEMPORARY}*"), *root.glob(f"{DISCARDED}*")]:
        shutil.rmtree(leftover, ignore_errors=True)  # may be on its way out by another hand already


def best_of(checkpoints: list[tuple[Path, Manifest]]) -> Path | None:
    """The checkpoint with the lowest validation RMSE; None if no checkpoint was validated.

    Only those count that were measured on what the newest of them was: on other cases, or by another protocol, an
    RMSE means something else. checkpoints: newest first.
    """
    scored = [(p, m) for p, m in checkpoints if m.state.get("validation") is not None]
    alike = [(m.state["validation"], -m.step, p) for p, m in scored if _basis(m) == _basis(scored[0][1])]
    return min(alike)[2] if alike else None


def _basis(manifest: Manifest) -> Any:
    """None in manifests of versions that did not say."""
    return manifest.state.get("basis")


def discard(path: Path) -> None:
    """Rename first, so that a kill in the middle never leaves half a checkpoint under its own name."""
    shutil.rmtree(_set_aside(path), ignore_errors=True)


def put_in_place(written: Path, target: Path) -> None:
    """Give a checkpoint that is all written its name. One that has it already is deleted by the next `prune` only:
    until the new one is in its place for good, there is no other.
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
    """Give their names to checkpoints that were all written when a kill came before the rename.

    Not while a save is under way.
    """
    for written in root.glob(f"{TEMPORARY}{PREFIX}*"):
        with suppress(Corrupt):  # half written: the manifest comes last
            target = directory(root, Manifest.read(written).step)
            if not target.exists():
                put_in_place(written, target)


def _set_aside(path: Path) -> Path:
    aside = path.with_name(f"{DISCARDED}{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    return path.rename(aside)
