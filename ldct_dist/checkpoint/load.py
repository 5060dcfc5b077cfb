"""Finding the newest checkpoint of which every byte is as it was written, and reading it at any world size.

Each rank hashes its share of the files, so that a large checkpoint does not pass through one rank. Each file is then
read by one rank and broadcast to the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open

from ldct_dist.checkpoint import retention
from ldct_dist.checkpoint.manifest import NAME, Corrupt, Manifest
from ldct_dist.errors import UserError, few
from ldct_dist.world import World

WEIGHTS = "weights.safetensors"  # the moving average: what one denoises with


@dataclass(frozen=True)
class Found:
    """The newest valid checkpoint, if there is one; passed_over: a line for each newer one that is not valid, and why."""

    path: Path | None = None
    manifest: Manifest | None = None
    passed_over: list[str] = field(default_factory=list)


def newest_valid(root: Path, world: World, among: Callable[[Manifest], bool] = lambda _: True) -> Found:
    """The newest checkpoint under `root` of which every byte is as it was written; the same on every rank.

    among: which checkpoints to consider at all.
    """
    sound, broken = world.on_main(lambda: retention.newest_first(root))
    passed_over = [f"{path.name}: {why}" for path, why in broken]
    for path, manifest in sound:
        if not among(manifest):
            continue
        faults = verify(path, manifest, world)
        if not faults:
            return Found(path, manifest, passed_over)
        passed_over.append(f"{path.name}: {few(faults)}")
    return Found(passed_over=passed_over)


def verify(path: Path, manifest: Manifest, world: World) -> list[str]:
    """What is wrong with the checkpoint's files, a line each; empty if nothing is. Each rank checks its share."""
    faults = []
    for i, name in enumerate(sorted(manifest.files)):
        if i % world.size == world.rank:
            try:
                manifest.check(path, name)
            except Corrupt as e:
                faults.append(str(e))
    return [fault for share in world.gather(faults) for fault in share]


def read(path: Path, manifest: Manifest, world: World) -> Iterator[tuple[str, str, torch.Tensor]]:
    """(file name, tensor name, tensor on the CPU) for all tensors, in the same order on every rank.

    It trusts the bytes: call it for a checkpoint that `newest_valid` has found.
    """
    for i, name in enumerate(sorted(manifest.files)):
        owner = i % world.size
        if owner == world.rank:
            with safe_open(path / name, framework="pt") as f:
                keys = sorted(f.keys())
                listing = [(k, tuple(f.get_slice(k).get_shape()), f.get_tensor(k).dtype) for k in keys]
                world.broadcast(listing, owner)
                for k in keys:
                    yield name, k, world.share(f.get_tensor(k), owner)
        else:
            for k, shape, dtype in world.broadcast(None, owner):
                yield name, k, world.share(torch.empty(shape, dtype=dtype), owner)


def verify_run(root: Path) -> list[str]:
    """What is wrong with the checkpoints under `root`, a line each; empty if every byte is as it was written."""
    sound, broken = retention.newest_first(root)
    faults = [f"{path}: {why}" for path, why in broken]
    for path, manifest in sound:
        faults += [f"{path}: {fault}" for fault in verify(path, manifest, World())]
    return faults


def weights_of(path: Path) -> Path:
    """The weights file that `path` means: `path` itself, that of a checkpoint, or that of a run's best checkpoint.

    The best is the one with the lowest validation RMSE; without validations, the newest. Raises UserError if there is
    no weights file.
    """
    if path.is_file():
        return path
    if (path / NAME).exists():
        return path / WEIGHTS
    sound, _ = retention.newest_first(path / "checkpoints")
    if not sound:
        raise UserError(f"{path}: not a weights file, a checkpoint, or a run that has one; give one of these")
    return (retention.best_of(sound) or sound[0][0]) / WEIGHTS
