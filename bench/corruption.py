"""Is any damage to a checkpoint or to a store found before its content is used?

A run of two ranks leaves checkpoints; then, one at a time, single bytes of the newest one are changed, or one of its
files is cut short. Found means: the run would go on from the checkpoint before, and says why. In a store, single bits
are flipped. Found means: verify names the place, and the store refuses to be read where a voxel or a header is not
what was written.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ldct_dist.checkpoint.load import newest_valid, verify_run
from ldct_dist.errors import UserError
from ldct_dist.store.reader import Store
from ldct_dist.store.verify import verify as verify_store
from ldct_dist.world import World

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from forked import fork
from runs import write_config
from stores import make_store


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=1000, help="of each kind")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="corruption-"))
    store = make_store(
        folder / "store", [(20, 150, 140), (16, 40, 40), (8, 64, 64)], ["train", "train", "val"]
    ).path
    assert fork(write_config(folder, store)) == [0, 0]
    checkpoints = folder / "runs" / "run" / "checkpoints"
    figures = {
        **checkpoint_figures(checkpoints, options.trials),
        **store_figures(store, options.trials),
    }
    shutil.rmtree(folder)
    print(json.dumps(figures))


def checkpoint_figures(root: Path, trials: int) -> dict[str, object]:
    draw, found, victims = random.Random(0), 0, Counter[str]()
    before, newest = sorted(root.glob("step-*"))[-2:]
    files = sorted(newest.iterdir())
    assert newest_valid(root, World()).path == newest
    for trial in range(trials):
        victim = draw.choice(files)
        change = cut if trial % 4 == 3 else flip_byte
        with damaged(victim, lambda raw, change=change: change(raw, draw)):
            taken = newest_valid(root, World())
            said = len(taken.passed_over) == 1 and newest.name in taken.passed_over[0]
            found += taken.path == before and said and len(verify_run(root)) >= 1
            victims[victim.name] += 1
    assert newest_valid(root, World()).path == newest
    return {"checkpoint_flips": trials, "checkpoint_found": found, "checkpoint_files": dict(victims)}


def store_figures(path: Path, trials: int) -> dict[str, object]:
    draw, found, silent, victims = random.Random(1), 0, 0, Counter[str]()
    sound = contents(path)
    files = sorted(p for p in path.rglob("*") if p.is_file())
    assert verify_store(path) == []
    for _ in range(trials):
        victim = draw.choice(files)
        with damaged(victim, lambda raw: flip_bit(raw, draw)):
            faults = verify_store(path)
            found += any(names(fault, victim, path) for fault in faults)
            silent += misread(path, sound)
            victims[victim.name if victim.suffix else "shard"] += 1
    assert verify_store(path) == []
    return {
        "store_flips": trials,
        "store_found": found,
        "store_silently_wrong": silent,
        "store_files": dict(victims),
    }


def names(fault: str, victim: Path, store: Path) -> bool:
    """Whether the line names the damaged case, and the array if it is one; of what belongs to no case, the store."""
    parts = victim.relative_to(store).parts
    if parts[0] == "cases" and len(parts) > 2:
        return parts[1] in fault and (len(parts) < 4 or parts[2] in fault)
    return victim.name in fault or str(store) in fault


def contents(path: Path) -> list[tuple]:
    store = Store(path)
    return [
        (case, [store.volume(case.name, dose).hu for dose in case.doses], store.splits.tolist())
        for case in store.cases
    ]


def misread(path: Path, sound: list[tuple]) -> bool:
    """Whether the store can be read from end to end, and something of it is not what was written."""
    try:
        now = contents(path)
    except UserError:
        return False
    return not all(
        a[0] == b[0] and a[2] == b[2] and all(map(np.array_equal, a[1], b[1]))
        for a, b in zip(now, sound, strict=True)
    )


@contextmanager
def damaged(file: Path, change: Callable[[bytearray], bytearray]) -> Iterator[None]:
    whole = file.read_bytes()
    file.write_bytes(change(bytearray(whole)))
    try:
        yield
    finally:
        file.write_bytes(whole)


def flip_byte(raw: bytearray, draw: random.Random) -> bytearray:
    raw[draw.randrange(len(raw))] ^= draw.randrange(1, 256)
    return raw


def flip_bit(raw: bytearray, draw: random.Random) -> bytearray:
    raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    return raw


def cut(raw: bytearray, draw: random.Random) -> bytearray:
    return raw[: draw.randrange(len(raw))]


if __name__ == "__main__":
    main()
