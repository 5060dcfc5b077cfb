"""How fast paired crops come, against MONAI, against nnU-Net's scheme, and against what the machine allows.

All contestants read the same 24 cases with the same number of workers on the same cores, one after the other,
each between two runs of ours, so that a change in the machine's other load does not favour either side. What
MONAI needs is installed apart, under bench/.cache. The last line printed is JSON:

crops_per_s        paired float 64^3 crops a second, ours, at reuse 4 (each voxel read is used 4 times)
vs_monai           ours over the faster of CacheDataset and PersistentDataset
vs_blosc2          ours over nnU-Net's scheme
vs_limit           ours over the limit: bare decoding of the same chunks, and copying the crops out
rss_growth_mib     growth of memory between the 1,000th and the 10,000th batch
open_10k_vs_10     time to open a store of 10,000 cases and get the first batch, over the same with 10 cases
resume_1m_vs_0     time to the first batch at step 1,000,000, over that at step 0
read_amplification voxels decoded over distinct voxels used, at the defaults
staged_opens       files of the store opened for 100 batches, once all is copied to a disk of the node
staged_first_vs_plain  time to the first batch beside which copying begins and ends, over that without copies
rows               the same contest for each crop, with all figures
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from loaders import blosc2_crops, facts, monai_crops, ours, volumes

CACHE = Path(__file__).parent / ".cache"
PEERS = CACHE / "peers"
CORES = 2
CROPS = [(64, 64, 64), (32, 96, 96)]
REUSE = 4.0
WARM_UP = 8  # batches: more than any contestant makes ahead
CONTESTANTS = {
    "ours": lambda crop: ours.batches(CACHE, crop, CORES, REUSE),
    "ours_reuse_1": lambda crop: ours.batches(CACHE, crop, CORES, 1.0),
    "ours_augmented": lambda crop: ours.batches(CACHE, crop, CORES, REUSE, moved=True),
    "limit": lambda crop: ours.limit(CACHE, crop, CORES, REUSE),
    "limit_reuse_1": lambda crop: ours.limit(CACHE, crop, CORES, 1.0),
    "monai_cache": lambda crop: monai_crops.batches(CACHE, crop, CORES, "cache"),
    "monai_persistent": lambda crop: monai_crops.batches(CACHE, crop, CORES, "persistent"),
    "blosc2": lambda crop: blosc2_crops.batches(CACHE, crop, CORES),
    "blosc2_int16_lz4": lambda crop: blosc2_crops.batches(CACHE, crop, CORES, "int16"),
}
FACTS = {
    "memory": lambda: facts.memory(CACHE, 10_000),
    "opening": lambda: facts.opening(CACHE),
    "resuming": lambda: facts.resuming(CACHE),
    "reading": lambda: facts.reading(CACHE),
    "staging": lambda: facts.staging(CACHE),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=6.0, help="how long each contestant is timed")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    if arguments.child:
        print(json.dumps(_child(*arguments.child, arguments.seconds)), flush=True)
        os._exit(0)  # threads and workers that still make batches need not be asked to stop
    _install_peers()
    volumes.prepare(CACHE)
    rows = [_contest(crop, arguments.seconds) for crop in CROPS]
    result = {key: rows[0][key] for key in ("crops_per_s", "vs_monai", "vs_blosc2", "vs_limit")}
    for name in FACTS:
        result |= _run("fact", name, 0)
        print(f"{name}: done", file=sys.stderr)
    print(json.dumps(result | {"rows": rows}))


def _contest(crop: tuple[int, int, int], seconds: float) -> dict[str, Any]:
    """Every contestant between two runs of ours."""
    label = "x".join(map(str, crop))
    row: dict[str, Any] = {"crop": label}
    own = [_run("ours", label, seconds)]
    for name in list(CONTESTANTS)[1:]:
        theirs = _run(name, label, seconds)
        own.append(_run("ours", label, seconds))
        rate = (own[-2]["rate"] + own[-1]["rate"]) / 2
        row[name] = theirs | {"ours_over_it": rate / theirs["rate"]}
        print(f"{label} {name}: {row[name]}", file=sys.stderr)
    row["crops_per_s"] = sorted(r["rate"] for r in own)[len(own) // 2]
    row["cases_in_a_batch"] = own[0]["cases_in_a_batch"]
    row["reuse"] = REUSE
    row["vs_monai"] = min(row[name]["ours_over_it"] for name in ("monai_cache", "monai_persistent"))
    row["vs_blosc2"] = row["blosc2"]["ours_over_it"]
    row["vs_limit"] = row["limit"]["ours_over_it"]
    row["vs_limit_reuse_1"] = row["ours_reuse_1"]["rate"] / row["limit_reuse_1"]["rate"]
    return row | facts.evenness(CACHE, crop)


def _run(what: str, which: str, seconds: float) -> dict[str, Any]:
    """In a process of its own, so that nobody inherits another's threads or memory."""
    command = [sys.executable, __file__, "--seconds", str(seconds), "--child", what, which]
    path = os.pathsep.join([str(PEERS), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _child(what: str, which: str, seconds: float) -> dict[str, Any]:
    if what == "fact":
        return FACTS[which]()
    z, y, x = map(int, which.split("x"))
    return _rate(CONTESTANTS[what]((z, y, x)), seconds)


def _rate(batches: Iterator, seconds: float) -> dict[str, Any]:
    """Crops a second once batches flow, and how many different cases a batch holds."""
    for _ in range(WARM_UP):
        next(batches)
    crops = cases = number = 0
    start = now = time.perf_counter()
    while now < start + seconds:
        low, full, names = next(batches)
        assert low.shape == full.shape, (low.shape, full.shape)
        crops, cases, number = crops + len(low), cases + len(set(names)), number + 1
        now = time.perf_counter()
    return {"rate": crops / (now - start), "cases_in_a_batch": cases / number}


def _install_peers() -> None:
    if not PEERS.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(PEERS)]
        subprocess.run([*pip, "monai==1.5.*"], check=True, stdout=sys.stderr)


if __name__ == "__main__":
    main()
