"""What does ingest cost over reading the same pixels with bare pydicom?

Both sides read the same pairs of uncompressed series with the same number of processes, files in the page
cache, in turn. The bare loop reads each file, takes its pixels and stacks them: nothing is sorted, checked,
hashed, compressed or written. Both times count from a cold interpreter's call to the end, processes started
within it; `steady` leaves the start of the processes out, as the slope between half of the cases and all.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from pydicom import dcmread

from ldct_dist.ct.derived import write_derived
from ldct_dist.ct.dicom import find_series, read_series
from ldct_dist.store.ingest import IngestConfig, ingest

CACHE = Path(__file__).parent / ".cache" / "ingest"
SHIPPED = Path(__file__).parents[1] / "ldct_dist" / "demo_data"
REAL = Path(__file__).parents[2] / "shared" / "data"
QUIET = ("CRLM-CT-1004", "CRLM-CT-1006", "A0001/series-3", "A0002/series-3-B40f")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=24)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    source = make_source(options.cases)
    folders = sorted(p for p in source.glob("*/*") if p.is_dir())
    half = subset(source, options.cases // 2)
    sides: dict[str, Callable[[], None]] = {
        "pydicom": lambda: bare_loop(folders, options.workers),
        "ours": lambda: ours(source / "pairs.csv", options.workers),
        "pydicom_half": lambda: bare_loop(folders[: len(folders) // 2], options.workers),
        "ours_half": lambda: ours(half, options.workers),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(options.repeats):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
            print(f"turn {turn}: {name} {seconds[name][-1]:.2f} s", flush=True)
    middle = {name: statistics.median(times) for name, times in seconds.items()}
    slices = sum(1 for folder in folders for _ in folder.iterdir())
    print(
        json.dumps(
            {
                "vs_pydicom": middle["ours"] / middle["pydicom"],
                "vs_pydicom_steady": (middle["ours"] - middle["ours_half"])
                / (middle["pydicom"] - middle["pydicom_half"]),
                "ours_slices_per_s": slices / middle["ours"],
                "pydicom_slices_per_s": slices / middle["pydicom"],
                "slices": slices,
                "workers": options.workers,
            }
        )
    )


def ours(manifest: Path, workers: int) -> None:
    out = CACHE / "store.zarr"
    shutil.rmtree(out, ignore_errors=True)
    report = ingest(manifest, out, IngestConfig(workers=workers, key=CACHE / "key"))
    assert not report.rejected, report.rejected


def bare_loop(folders: Sequence[Path], workers: int) -> None:
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as processes:
        for _ in processes.map(read_stack, folders):
            pass


def read_stack(folder: Path) -> int:
    return np.stack([dcmread(path).pixel_array for path in sorted(folder.iterdir())]).nbytes


def make_source(cases: int) -> Path:
    """Pairs of real series, the low dose with white noise of 20 HU, repeated, as uncompressed DICOM."""
    root = CACHE / f"source-{cases}"
    manifest = root / "pairs.csv"
    if manifest.exists():
        return root
    shutil.rmtree(root, ignore_errors=True)
    real = [folder for name in QUIET for folder in REAL.rglob(name)]
    series = [s for folder in real or [SHIPPED] for s in find_series(folder)[0]]
    rows = []
    for i in range(cases):
        one = series[i % len(series)]
        hu, noise = read_series(one).hu, np.random.default_rng(i).normal(0, 20, one.shape)
        for role, image in (("full", hu), ("low", np.clip(hu + noise, -1024, 3000).astype(np.int16))):
            write_derived(one, image, root / f"{i:03d}" / role, f"{role} {i}")
        rows.append([f"scan-{i:03d}", f"patient-{i % len(series)}", f"{i:03d}/full", f"{i:03d}/low"])
    write_manifest(manifest, rows)
    return root


def subset(source: Path, cases: int) -> Path:
    with open(source / "pairs.csv", newline="") as f:
        rows = list(csv.reader(f))[1 : cases + 1]
    write_manifest(source / "half.csv", rows)
    return source / "half.csv"


def write_manifest(path: Path, rows: Sequence[Sequence[str]]) -> None:
    with open(path, "w", newline="") as f:
        csv.writer(f).writerows([["case", "patient", "full", "low"], *rows])


if __name__ == "__main__":
    main()
