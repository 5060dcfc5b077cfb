"""Figures of the loader besides its rate: memory, cost of opening and resuming, evenness, and how much is read for it."""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from ldct_dist.ct.volume import Volume
from ldct_dist.data.loader import Loader
from ldct_dist.data.plan import DataConfig, Plan
from ldct_dist.data.stage import Copier, StagedStore
from ldct_dist.store import layout
from ldct_dist.store.reader import Region, Store
from ldct_dist.store.record import case_metadata
from ldct_dist.world import World
from loaders import volumes

MIB = 1 << 20
SMALL = (16, 64, 64)


def memory(cache: Path, batches: int) -> dict[str, float]:
    """RSS of a loader at its defaults over many batches of 8 crops of 64^3: its growth, and its peak above the imports."""
    before = _rss()
    plan = Plan(Store(cache / "store"), DataConfig(crop=(64, 64, 64)), seed=0)
    with Loader(plan) as loader:
        for step in range(batches // 10):
            loader.batch(step)
        early = _rss()
        for step in range(batches // 10, batches):
            loader.batch(step)
        growth = _rss() - early
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
    assert peak <= plan.config.memory_mib, f"{peak} MiB is beyond the budget of {plan.config.memory_mib}"
    return {"rss_growth_mib": growth, "rss_peak_mib": peak, "budget_mib": plan.config.memory_mib}


def opening(cache: Path) -> dict[str, float]:
    """Seconds to open a store and get the first batch, at 10 and at 10,000 small cases."""

    def first_batch(store: Path) -> Callable[[], None]:
        def run() -> None:
            config = DataConfig(crop=SMALL, reuse=1.0)
            with Loader(Plan(Store(store), config, seed=0)) as loader:
                loader.batch(0)

        return run

    few, many = (_small_store(cache, n) for n in (10, 10_000))
    few_s, many_s = _medians(first_batch(few), first_batch(many))
    return {"open_10_s": few_s, "open_10k_s": many_s, "open_10k_vs_10": many_s / few_s}


def resuming(cache: Path) -> dict[str, float]:
    """Seconds to the first batch of a new loader, at step 0 and at step 1,000,000."""
    store = Store(cache / "store")

    def batch_at(step: int) -> Callable[[], None]:
        def run() -> None:
            with Loader(Plan(store, DataConfig(), seed=0)) as loader:
                loader.batch(step)

        return run

    start_s, resume_s = _medians(batch_at(0), batch_at(1_000_000))
    return {"resume_0_s": start_s, "resume_1m_s": resume_s, "resume_1m_vs_0": resume_s / start_s}


class _Counting(Store):
    """Counts the voxels that are read."""

    voxels = 0

    def read(self, case: str, dose: str, region: Region, out: np.ndarray | None = None) -> np.ndarray:
        self.voxels += int(np.prod([r.stop - r.start for r in region]))
        return super().read(case, dose, region, out)


def reading(cache: Path) -> dict[str, float]:
    """How much is read for what is used, at the defaults.

    read_amplification: voxels decoded over distinct voxels used, over whole blocks. bytes_read_per_voxel:
    int16 voxels are stored compressed. opens_per_block: files opened for a block, both doses together.
    """
    store = _Counting(cache / "store")
    plan = Plan(store, DataConfig(), seed=0)
    k = plan.crops_per_block
    decoded = distinct = 0
    for lane in range(plan.config.batch):
        for number in range(1, 4):
            seen = np.zeros(plan.block(lane, number).size, bool)
            for step in range(number * k - lane, (number + 1) * k - lane):
                crop = plan.crop(step, lane)
                seen[_inside(crop.start, plan.config.crop, crop.block.region)] = True
            decoded, distinct = decoded + seen.size, distinct + int(seen.sum())

    opened = _opened_files()
    bytes_before = _bytes_read()
    with Loader(plan) as loader:
        for step in range(4 * k):
            loader.batch(step)
    bytes_read = _bytes_read() - bytes_before
    opens = sum(str(cache / "store") in name for name in opened)
    return {
        "read_amplification": decoded / distinct,
        "reuse_default": plan.config.reuse,
        "crops_per_block": k,
        "bytes_read_per_voxel": bytes_read / store.voxels,
        "opens_per_block": opens / (store.voxels / 2 / plan.blocks.mean_voxels),
    }


def staging(cache: Path) -> dict[str, float]:
    """What copies on the node's own disk cost at the start, and how often the store is still opened afterwards."""
    source, config = _small_store(cache, 10), DataConfig(crop=SMALL, reuse=1.0)

    def first_batch(stage: Path | None) -> Callable[[], None]:
        def run() -> None:
            if stage is not None:
                shutil.rmtree(stage, ignore_errors=True)
                stage.mkdir()
            store = StagedStore(source, str(stage) if stage else None, say=lambda line: None)
            plan = Plan(store, config, seed=0)
            with store.staging(plan, World(), range(100), []), Loader(plan) as loader:
                loader.batch(0)

        return run

    with TemporaryDirectory(dir=cache) as folder:
        plain_s, staged_s = _medians(first_batch(None), first_batch(Path(folder, "stage")))
        store = StagedStore(source, folder, say=lambda line: None)
        assert store.copies is not None
        Copier(store, store.copies, print).copy((c.name, dose) for c in store.cases for dose in c.doses)
        opened = _opened_files()
        with Loader(Plan(store, config, seed=0)) as loader:
            for step in range(100):
                loader.batch(step)
        opens = sum(str(source) in name for name in opened)
    return {"staged_first_s": staged_s, "staged_first_vs_plain": staged_s / plain_s, "staged_opens": opens}


def evenness(cache: Path, crop: tuple[int, int, int], views: int = 30) -> dict[str, float]:
    """Coefficient of variation of how often the voxels of a volume are seen, over all voxels and over its body.

    At `views` crops' worth of voxels a voxel. MONAI and nnU-Net draw corners evenly (nnU-Net's oversampling of
    labelled voxels has no meaning here), so they share a figure.
    """
    store = Store(cache / "store")
    name, shape = store.cases[0].name, store.cases[0].shape
    body = store.volume(name, layout.FULL_DOSE).hu > layout.BODY_HU
    count = views * int(np.prod(shape)) // int(np.prod(crop))
    drawn = np.random.default_rng(0).integers(np.subtract(shape, crop) + 1, size=(count, 3))
    result = _variation("random_corners", drawn, crop, body)
    for label, min_body in (("ours", DataConfig().min_body), ("ours_all_blocks", 0.0)):
        plan = Plan(store, DataConfig(crop=crop, min_body=min_body, batch=1), seed=0)
        starts, number = [], 0
        while len(starts) < count:
            if plan.block(0, number).case == name:
                k = plan.crops_per_block
                starts += [plan.crop(number * k + turn, 0).start for turn in range(k)]
            number += 1
        result |= _variation(label, np.array(starts), crop, body)
    return result


def _variation(
    label: str, starts: np.ndarray, crop: tuple[int, int, int], body: np.ndarray
) -> dict[str, float]:
    seen = np.zeros([n + 1 for n in body.shape], np.int32)
    for corner in np.ndindex(2, 2, 2):  # a box is eight corners of an array summed up along all axes
        where = starts + np.multiply(corner, crop)
        np.add.at(seen, tuple(where.T), (-1) ** sum(corner))
    for axis in range(3):
        np.cumsum(seen, axis, out=seen)
    seen = seen[:-1, :-1, :-1]
    return {f"{label}_cv": seen.std() / seen.mean(), f"{label}_cv_body": seen[body].std() / seen[body].mean()}


def _inside(
    start: tuple[int, int, int], crop: tuple[int, int, int], region: tuple[slice, ...]
) -> tuple[slice, ...]:
    return tuple(
        slice(max(s - r.start, 0), s + c - r.start) for s, c, r in zip(start, crop, region, strict=True)
    )


def _medians(*runs: Callable[[], None], repeats: int = 7) -> list[float]:
    """Median seconds of each, taken in turns."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, taken in zip(runs, times, strict=True):
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
    return [statistics.median(t) for t in times]


def _opened_files() -> list[str]:
    """The files that this process opens from now on: the list grows."""
    opened: list[str] = []
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
    return opened


def _bytes_read() -> int:
    """By this process so far, from files and from the page cache alike."""
    return int(Path("/proc/self/io").read_text().split()[1])


def _rss() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / MIB


def _small_store(cache: Path, cases: int) -> Path:
    """A store of many small cases: one is written, the others are its copies under names of their own."""
    path = cache / f"small-{cases}"
    if volumes.is_store(path):
        return path
    shutil.rmtree(path, ignore_errors=True)
    layout.create(path)
    hu = np.random.default_rng(0).normal(0, 50, (32, 128, 128)).astype(np.int16)
    doses = {1.0: Volume(hu, (1.0, 1.0, 1.0)), 0.25: Volume(hu, (1.0, 1.0, 1.0))}
    record = layout.write_case(path, "case-00000", doses, patient="case-00000", split="train")
    first = path / layout.CASES / "case-00000"
    for i in range(1, cases):
        name = f"case-{i:05d}"
        copy = shutil.copytree(first, first.with_name(name), copy_function=os.link)
        (copy / "zarr.json").unlink()
        (copy / "zarr.json").write_bytes(case_metadata(replace(record, name=name, patient=name)))
    layout.finalise(path)
    return path
