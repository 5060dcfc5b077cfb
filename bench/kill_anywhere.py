"""Does a run that is killed at any instant, saves and renames included, end as if nothing had happened?

Two ranks train a small network and save every other step. Each start is killed by SIGKILL: in a step, in a phase of a
save, or just before or after one of its renames. Once a run is done, it is compared with one that was never killed, and
the next begins.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from forked import fork
from killer import IN_A_SAVE, PHASES, KilledRun, leftovers
from runs import same, write_config
from stores import make_store

TARGETS = (*PHASES, "train", "train")
"""What is aimed at, in turn; within a step, where a run spends its time, three times as often."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kill-anywhere-"))
    store = make_store(folder / "store", [(16, 40, 40)] * 3, ["train", "train", "val"]).path
    longer = {"steps": options.steps, "checkpoint": {"every": 2}}
    (folder / "unbroken").mkdir()
    assert fork(write_config(folder / "unbroken", store, **longer)) == [0, 0]
    reference = folder / "unbroken" / "runs" / "run"

    draw, phases = random.Random(0), Counter[str]()
    lost, runs, equal = 0, 0, True
    while phases.total() < options.kills:
        home = folder / f"killed-{runs}"
        home.mkdir()
        run = KilledRun(write_config(home, store, **longer), home / "runs" / "run")
        while phases.total() < options.kills and run.newest_step() < options.steps:
            met = run.strike(TARGETS[phases.total() % len(TARGETS)], draw)
            if met is not None:
                phases[met] += 1
            print(f"kill {phases.total()}: {met}, newest checkpoint at step {run.newest_step()}", flush=True)
        done = run.finish() == [0, 0]
        equal &= done and leftovers(run.run) == [] and same(run.run, reference)
        lost, runs = lost + run.lost, runs + 1
        if equal:
            shutil.rmtree(home)
    in_a_save = sum(phases[phase] for phase in IN_A_SAVE)
    print(
        json.dumps(
            {
                "kills": phases.total(),
                "kills_by_phase": dict(phases),
                "kills_in_a_save": in_a_save,
                "lost": lost,
                "runs": runs,
                "bitwise_equal": equal,
            }
        )
    )
    if equal:
        shutil.rmtree(folder)
    else:
        sys.exit(f"what differs stays in {folder}")


if __name__ == "__main__":
    main()
