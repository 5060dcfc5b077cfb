from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import make_store

from ldct_dist.data.plan import DataConfig, Plan, lanes_of
from ldct_dist.errors import UserError

SHAPES = [(20, 40, 40), (33, 40, 50), (9, 64, 64), (40, 40, 40), (16, 48, 40)] * 4


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("plan") / "ct.zarr", SHAPES)


def plan_of(store, seed=0, **config):
    return Plan(store, DataConfig(**{"crop": (16, 24, 24), "batch": 8, "min_body": 0.0, **config}), seed)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(step=st.integers(0, 10**7), seed=st.integers(0, 2**31), per_block=st.integers(1, 20))
def test_ranks_share_the_same_global_batch_at_any_step(store, step, seed, per_block):
    whole = plan_of(store, seed, crops_per_block=per_block).crops(step)
    assert [c.index for c in whole] == list(range(step * 8, step * 8 + 8))
    for world in (1, 2, 4, 8):
        shared = {}
        for rank in range(world):
            # another process starts at this very step: a plan of its own, nothing replayed
            resumed = plan_of(store, seed, crops_per_block=per_block)
            shared.update({lane: resumed.crop(step, lane) for lane in lanes_of(rank, world, 8)})
        assert tuple(shared[lane] for lane in range(8)) == whole


@settings(deadline=None, max_examples=60, derandomize=True)
@given(step=st.integers(0, 10**6), lane=st.integers(0, 7), seed=st.integers(0, 100))
def test_a_crop_lies_in_its_block_and_its_volume(store, step, lane, seed):
    crop = plan_of(store, seed).crop(step, lane)
    for start, size, n, region in zip(crop.start, (16, 24, 24), crop.shape, crop.region, strict=True):
        if n <= size:
            assert (region.start, region.stop) == (0, n)
            assert start <= 0
            assert start + size >= n
        else:
            assert 0 <= region.start <= start
            assert start + size <= region.stop <= n


def test_a_lane_cuts_all_crops_of_a_block_in_a_row(store):
    plan = plan_of(store, crops_per_block=5)
    for lane in range(8):
        blocks = [plan.crop(step, lane).block for step in range(60)]
        counts = Counter(blocks)
        assert sorted(blocks) == blocks
        assert set(counts[b] for b in blocks[5:55]) == {5}


def test_a_batch_of_eight_holds_eight_cases(store):
    plan = plan_of(store, crops_per_block=8)
    for step in range(400):
        assert len({crop.case for crop in plan.crops(step)}) == 8


def test_every_case_is_read_as_often_as_any_other(store):
    plan = plan_of(store, crops_per_block=1)
    counts = Counter(crop.case for step in range(500) for crop in plan.crops(step))
    assert len(counts) == len(SHAPES)
    assert max(counts.values()) < 1.2 * min(counts.values())


def test_another_seed_is_another_order(store):
    assert [c.start for c in plan_of(store, 1).crops(3)] != [c.start for c in plan_of(store, 2).crops(3)]


def test_voxels_are_seen_evenly_borders_included(tmp_path):
    store = make_store(tmp_path / "ct.zarr", [(32, 384, 384)])
    plan = plan_of(store, crop=(32, 96, 96), batch=1, crops_per_block=16)
    seen = np.zeros((384, 384))
    for step in range(4000):
        _, y, x = plan.crop(step, 0).start
        seen[y : y + 96, x : x + 96] += 1
    assert seen.std() / seen.mean() < 0.45
    assert seen[:8, 150:250].mean() > 0.25 * seen.mean()


def test_body_is_preferred_over_air(tmp_path):
    store = make_store(tmp_path / "ct.zarr", [(32, 512, 512)])
    body = store.volume("case-000", "1.00").hu > -500

    def share(min_body):
        plan = plan_of(store, crop=(32, 64, 64), batch=1, crops_per_block=4, min_body=min_body)
        starts = [plan.crop(step, 0).start for step in range(300)]
        return np.mean([body[:, y : y + 64, x : x + 64].mean() for _, y, x in starts])

    assert share(0.6) > share(0.0)


def test_a_batch_that_ranks_cannot_share_is_refused_with_the_sizes_that_would_do():
    with pytest.raises(UserError, match=r"batch=12 cannot be shared evenly by 5 ranks; it can by 1, 2, 3, 4, 6, 12"):
        lanes_of(0, 5, 12)


def test_the_order_changes_with_the_batch_layout_only_where_it_must(store):
    """The thread count and the memory budget are no part of the order."""
    one, other = plan_of(store, threads=1), plan_of(store, threads=7, memory_mib=64)
    assert one.crops(11) == other.crops(11)
    assert replace(one.crops(11)[0], index=0) != replace(one.crops(12)[0], index=0)
