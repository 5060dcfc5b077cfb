"""What does ingest cost over reading the same pixels with bare pydicom?

Both sides are commands, run in turn with the same number of worker processes over the same pairs of uncompressed
series, files in the page cache. The bare loop reads each file, takes its pixels and stacks them: nothing is sorted,
checked, hashed, compressed or written. Times are from a command's start to its end; `steady` leaves the start of
processes out: it is the slope between half of the cases and all. `cpu` figures are processor time, which depends little
on other work on the machine.
"""

from __future__ import annotations

import argparse
import compileall
import csv
import ctypes
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
from pydicom import dcmread

CACHE = Path(__file__).parent / ".cache" / "ingest"
SHIPPED = Path(__file__).parents[1] / "ldct_dist" / "demo_data"
REAL = Path(__file__).parents[2] / "shared" / "data"
PR_SET_CHILD_SUBREAPER = 36  # of prctl.h
QUIET = ("CRLM-CT-1004", "CRLM-CT-1006", "A0001/series-3", "A0002/series-3-B40f")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=128)  # 11,900 slices, as many as Mayo 2016 has at 1 mm
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)  # be the bare loop over this manifest
    options = parser.parse_args()
    if options.bare:
        bare_loop(options.bare, options.workers)
        return
    compileall.compile_dir(SHIPPED.parent, quiet=1)  # as pip does what it installs, and pydicom is
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    source = make_source(options.cases)
    manifests = {"": source / "pairs.csv", "_half": subset(source, options.cases // 2)}
    wall: dict[str, list[float]] = {}
    cpu: dict[str, list[float]] = {}
    for turn in range(options.repeats):
        for size, manifest in manifests.items():
            for side, command in (("pydicom", bare), ("ours", ours)):
                seconds, busy = timed(command(manifest, options.workers))
                wall.setdefault(side + size, []).append(seconds)
                cpu.setdefault(side + size, []).append(busy)
                print(f"turn {turn}: {side}{size} {seconds:.2f} s, {busy:.2f} s of CPU", flush=True)
    slices = sum(1 for folder in folders_of(manifests[""]) for _ in folder.iterdir())
    whole, steady = ratios(wall)
    whole_cpu, steady_cpu = ratios(cpu)
    result = {
        "vs_pydicom": whole,
        "vs_pydicom_steady": steady,
        "vs_pydicom_cpu": whole_cpu,
        "vs_pydicom_cpu_steady": steady_cpu,
        "ours_slices_per_s": slices / statistics.median(wall["ours"]),
        "pydicom_slices_per_s": slices / statistics.median(wall["pydicom"]),
        "slices": slices,
        "workers": options.workers,
    }
    print(json.dumps({name: round(value, 3) for name, value in result.items()}))


def ratios(times: dict[str, list[float]]) -> tuple[float, float]:
    """Ours over pydicom: all, and without what does not grow with the cases."""
    middle = {name: statistics.median(values) for name, values in times.items()}
    slope = (middle["ours"] - middle["ours_half"]) / (middle["pydicom"] - middle["pydicom_half"])
    return middle["ours"] / middle["pydicom"], slope


def timed(command: Sequence[str | Path]) -> tuple[float, float]:
    """Seconds that `command` takes, and seconds of CPU that it and its processes use."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - start
    with suppress(ChildProcessError):
        while os.wait():  # for the processes that it leaves to end by themselves
            pass
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def ours(manifest: Path, workers: int) -> list[str | Path]:
    out = CACHE / "store.zarr"
    shutil.rmtree(out, ignore_errors=True)
    return [
        *(sys.executable, "-m", "ldct_dist", "ingest", manifest, out),
        *(f"workers={workers}", f"key={CACHE / 'key'}"),
    ]


def bare(manifest: Path, workers: int) -> list[str | Path]:
    return [sys.executable, __file__, "--bare", manifest, "--workers", str(workers)]


def bare_loop(manifest: Path, workers: int) -> None:
    with ProcessPoolExecutor(workers) as processes:
        for _ in processes.map(read_stack, folders_of(manifest)):
            pass


def read_stack(folder: Path) -> int:
    return np.stack([dcmread(path).pixel_array for path in sorted(folder.iterdir())]).nbytes


def folders_of(manifest: Path) -> list[Path]:
    with open(manifest, newline="") as f:
        return [manifest.parent / row[role] for row in csv.DictReader(f) for role in ("full", "low")]


def make_source(cases: int) -> Path:
    """Pairs of real series, the low dose with white noise of 20 HU, repeated, as uncompressed DICOM."""
    from ldct_dist.ct.derived import write_derived
    from ldct_dist.ct.dicom import find_series, read_series

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
