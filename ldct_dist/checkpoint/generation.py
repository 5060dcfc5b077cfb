"""Fencing: each start of a run claims the next generation, and only the newest generation may write."""

from __future__ import annotations

from pathlib import Path


class Fenced(Exception):
    """A newer start of the same run has taken over; this process must stop without writing."""


def claim(root: Path) -> int:
    """Claim the next generation under `root` and return its number, from 1.

    mkdir is atomic: it either makes the directory or fails, also on network file systems, where locks may not work.
    """
    root.mkdir(parents=True, exist_ok=True)
    generation = newest(root)
    while True:
        generation += 1
        try:
            (root / f"{generation:06d}").mkdir()
        except FileExistsError:
            continue  # another start of the run was quicker
        return generation


def newest(root: Path) -> int:
    """The newest generation claimed under `root`; 0 if none was."""
    return max((int(p.name) for p in root.iterdir() if p.name.isdigit()), default=0)


def check(root: Path, generation: int) -> None:
    """Raises Fenced if a generation newer than `generation` has been claimed."""
    if newest(root) > generation:
        raise Fenced(f"generation {generation} was taken over by generation {newest(root)} of this run")
