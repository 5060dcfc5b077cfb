from __future__ import annotations

import gc
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldct_dist.data.plan import DataConfig, Plan, lanes_of
from ldct_dist.errors import UserError
from ldct_dist.store import layout
from stores import make_store

SHAPES = [(20, 40, 40), (33, 40, 50), (9, 64, 64), (40, 40, 40), (16, 48, 40)] * 4


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Cases of many small chunks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "CHUNK", (16, 16, 24))
        return make_store(tmp_path_factory.mktemp("plan") / "ct.zarr", SHAPES)


def plan_of(store, seed=0, **config):
    return Plan(store, DataConfig(**{"crop": (16, 24, 24), "batch": 8, "min_body": 0.0, **config}), seed)


def corners(crops):
    return [(crop.block.case, crop.start) for crop in crops]


@settings(deadline=None, max_examples=40, derandomize=True)
@given(step=st.integers(0, 10**7), seed=st.integers(0, 2**31), reuse=st.floats(0.1, 4))
def test_ranks_share_the_same_global_batch_at_any_step(store, step, seed, reuse):
    whole = plan_of(store, seed, reuse=reuse).crops(step)
    assert [c.index for c in whole] == list(range(step * 8, step * 8 + 8))
    for world in (1, 2, 4, 8):
        shared = {}
        for rank in range(world):
            # another process starts at this very step: a plan of its own, nothing replayed
            resumed = plan_of(store, seed, reuse=reuse)
            shared.update({lane: resumed.crop(step, lane) for lane in lanes_of(rank, world, 8)})
        assert tuple(shared[lane] for lane in range(8)) == whole


@settings(deadline=None, max_examples=60, derandomize=True)
@given(step=st.integers(0, 10**6), lane=st.integers(0, 7), seed=st.integers(0, 100))
def test_a_crop_lies_in_its_block_and_its_volume(store, step, lane, seed):
    crop = plan_of(store, seed).crop(step, lane)
    for start, size, n, region in zip(
        crop.start, (16, 24, 24), crop.block.shape, crop.block.region, strict=True
    ):
        if n <= size:
            assert (region.start, region.stop) == (0, n)
            assert start <= 0
            assert start + size >= n
        else:
            assert 0 <= region.start <= start
            assert start + size <= region.stop <= n


def test_nothing_of_a_case_is_kept_in_memory_once_it_was_planned(store):
    """Else ten thousand cases would take hundreds of MiB beside data.memory_mib."""
    plan = plan_of(store)
    plan.blocks.of(0)
    tracemalloc.start()
    for case in plan.cases:
        plan.blocks.of(int(case))
    gc.collect()  # numpy's views leave cycles
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held / len(plan.cases) < 200


def test_a_lane_cuts_all_crops_of_a_block_in_a_row(store):
    plan = plan_of(store)
    k = plan.crops_per_block
    assert k > 2
    for lane in range(8):
        keys = [plan.crop(step, lane).key for step in range(10 * k)]
        assert keys == sorted(keys)
        assert set(Counter(keys[k:-k]).values()) <= {k, *range(1, k)}
        assert Counter(keys).most_common(1)[0][1] == k


def test_a_voxel_that_was_read_is_used_as_often_as_asked_for_on_average(store):
    for reuse in (1.0, 3.0):
        plan = plan_of(store, reuse=reuse)
        blocks, used = {}, 0
        for step in range(300):
            for crop in plan.crops(step):
                blocks[crop.key] = np.prod(crop.block.size)
                used += np.prod(np.minimum((16, 24, 24), crop.block.shape))
        assert 0.6 * reuse < used / sum(blocks.values()) < 1.1 * reuse


@settings(deadline=None, max_examples=30, derandomize=True)
@given(cases=st.integers(1, 20), batch=st.integers(1, 12), seed=st.integers(0, 50), reuse=st.floats(0.1, 4))
def test_a_batch_holds_as_many_cases_as_it_can(store, cases, batch, seed, reuse):
    plan = plan_of(Some(store, cases), seed, batch=batch, reuse=reuse)
    for step in range(0, 200, 9):
        assert len({crop.block.case for crop in plan.crops(step)}) == min(cases, batch)


class Some:
    """The first few cases of a store."""

    def __init__(self, store, count):
        self._store, self._count = store, count

    def split(self, name):
        return self._store.split(name)[: self._count]

    def __getattr__(self, name):
        return getattr(self._store, name)


def test_every_case_is_read_as_often_as_any_other(store):
    plan = plan_of(store)
    cases = Counter(plan.case(lane, number)[0] for number in range(3, 103) for lane in range(8))
    assert len(cases) == len(SHAPES)
    assert max(cases.values()) - min(cases.values()) <= 2


def test_another_seed_is_another_order_and_a_second_plan_is_the_same(store):
    assert corners(plan_of(store, 1).crops(3)) != corners(plan_of(store, 2).crops(3))
    assert corners(plan_of(store, 1).crops(3)) == corners(plan_of(store, 1).crops(3))


def test_the_order_of_cases_and_blocks_changes_from_epoch_to_epoch(store):
    plan = plan_of(store, batch=4)
    epoch = len(SHAPES) // 4
    sequence = [plan.block(lane, number) for number in range(3 * epoch) for lane in range(4)]
    thirds = [sequence[i : i + len(SHAPES)] for i in range(0, len(sequence), len(SHAPES))]
    assert len({tuple(b.case for b in third) for third in thirds}) == 3
    assert len({frozenset((b.case, str(b.region)) for b in third) for third in thirds}) > 1


def test_voxels_are_seen_evenly_borders_included(tmp_path):
    store = make_store(tmp_path / "ct.zarr", [(32, 384, 384)])
    plan = plan_of(store, crop=(32, 96, 96), batch=1)
    seen = np.zeros((384, 384))
    for step in range(4000):
        _, y, x = plan.crop(step, 0).start
        seen[y : y + 96, x : x + 96] += 1
    assert seen.std() / seen.mean() < 0.35
    assert seen.min() > 0.1 * seen.mean()


def test_body_is_preferred_over_air(tmp_path):
    store = make_store(tmp_path / "ct.zarr", [(32, 512, 512)])
    body = store.volume("case-000", "1.00").hu > -500

    def share(min_body):
        plan = plan_of(store, crop=(32, 64, 64), batch=1, min_body=min_body)
        starts = [plan.crop(step, 0).start for step in range(300)]
        return np.mean([body[:, y : y + 64, x : x + 64].mean() for _, y, x in starts])

    assert share(0.6) > share(0.0) + 0.05


def test_a_batch_that_ranks_cannot_share_evenly_is_refused_with_the_numbers_of_ranks_that_can():
    with pytest.raises(
        UserError, match=r"batch=12 cannot be shared evenly by 5 ranks; use 1, 2, 3, 4, 6, 12 ranks"
    ):
        lanes_of(0, 5, 12)


def test_threads_and_memory_are_no_part_of_the_order(store):
    one, other = plan_of(store, threads=1), plan_of(store, threads=7, memory_mib=64)
    assert one.crops(11) == other.crops(11)


def test_a_dose_that_the_store_does_not_have_is_refused(store):
    with pytest.raises(
        UserError, match=r"20 of 20 cases lack dose 0.10, such as case-000, which has 1.00, 0.25"
    ):
        plan_of(store, dose=0.1)
