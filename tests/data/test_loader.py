from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldct_dist import config as configs
from ldct_dist.ct.volume import AIR_HU
from ldct_dist.data.augment import AugmentConfig
from ldct_dist.data.lesions import LesionConfig
from ldct_dist.data.loader import Loader
from ldct_dist.data.plan import DataConfig, Plan
from ldct_dist.errors import UserError
from ldct_dist.store import layout
from ldct_dist.store.reader import Store
from ldct_dist.train.config import RunConfig
from on_gpu import on_gpu
from stores import make_store

CONFIGS = Path(__file__).parents[2] / "configs"
NO_AUGMENT = AugmentConfig(flips=False, transpose=False)
ALL_AUGMENT = AugmentConfig(dose_mix=(0.5, 2.0), lesions=LesionConfig(count=9))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Cases of many small chunks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "CHUNK", (16, 16, 24))
        return make_store(
            tmp_path_factory.mktemp("loader") / "ct.zarr", [(20, 40, 40), (33, 40, 50), (9, 64, 64)] * 3
        )


def plan_of(store, **config):
    return Plan(store, DataConfig(**{"crop": (16, 24, 24), "batch": 4, "reuse": 1.0, **config}), seed=5)


def batches(store, steps, rank=0, world=1, **config):
    with Loader(plan_of(store, **config), rank, world) as loader:
        for step in steps:
            batch = loader.batch(step)
            yield batch.tensors


@settings(deadline=None, max_examples=15, derandomize=True)
@given(start=st.integers(0, 10**6))
def test_one_two_and_four_ranks_see_the_same_voxels_and_so_does_a_resume_at_any_step(store, start):
    whole = list(batches(store, range(start, start + 4), augment=ALL_AUGMENT))
    for world in (2, 4):
        for rank in range(world):
            # this one resumes a step later
            for mine, all_of in zip(
                batches(store, range(start + 1, start + 4), rank, world, augment=ALL_AUGMENT),
                whole[1:],
                strict=True,
            ):
                for tensor, expected in zip(mine, all_of, strict=True):
                    assert torch.equal(tensor, expected[rank::world])


def test_a_batch_is_cut_from_the_volumes_at_the_planned_places(store):
    plan = plan_of(store, augment=NO_AUGMENT)
    with Loader(plan) as loader:
        for step in range(12):
            batch = loader.batch(step)
            for i, crop in enumerate(plan.crops(step)):
                for tensor, dose in ((batch.low, "0.25"), (batch.full, "1.00")):
                    padded = np.pad(store.volume(crop.block.case, dose).hu, 24, constant_values=AIR_HU)
                    z, y, x = (s + 24 for s in crop.start)
                    assert np.array_equal(tensor[i, 0].numpy(), padded[z : z + 16, y : y + 24, x : x + 24])


@pytest.mark.parametrize("augment", [NO_AUGMENT, AugmentConfig()])
def test_the_box_tells_padding_from_volume(store, augment):
    for low, full, box in batches(store, range(20), augment=augment):
        for i in range(len(low)):
            inside = np.zeros((16, 24, 24), bool)
            inside[tuple(slice(max(a, 0), max(b, 0)) for a, b in box[i].tolist())] = True
            assert (low[i, 0].numpy()[~inside] == AIR_HU).all()
            assert (full[i, 0].numpy()[inside] != AIR_HU).all()


def test_low_and_full_dose_move_alike(store):
    for low, full, _ in batches(store, range(20)):
        body = full > -500
        if body.sum() > 1000:
            difference = (low - full)[body]
            assert abs(difference.mean()) < 3  # unpaired, tissue against air would show as hundreds of HU
            assert 25 < difference.std() < 35


def test_dose_mixing_scales_the_noise_within_its_range(store):
    mixed = AugmentConfig(flips=False, transpose=False, dose_mix=(0.5, 2.0))
    ratios = []
    for (low, full, _), (plain_low, plain_full, _) in zip(
        batches(store, range(10), augment=mixed), batches(store, range(10), augment=NO_AUGMENT), strict=True
    ):
        assert torch.equal(full, plain_full)
        noise, plain = (low - full).flatten(1), (plain_low - plain_full).flatten(1)
        ratios += [(n.norm() / p.norm()).item() for n, p in zip(noise, plain, strict=True) if p.norm() > 0]
    assert 0.5 <= min(ratios) < 0.9 < 1.5 < max(ratios) <= 2.0


def test_lesions_lie_in_both_doses_and_weigh_more(store):
    config = LesionConfig(count=9, weight=50)
    augment = AugmentConfig(flips=False, transpose=False, lesions=config)
    found = 0
    for with_them, without in zip(
        batches(store, range(10), augment=augment), batches(store, range(10), augment=NO_AUGMENT), strict=True
    ):
        low, full, _, weights = with_them
        plain_low, plain_full, _ = without
        assert torch.equal(low - plain_low, full - plain_full)
        assert torch.equal(weights, torch.where(full != plain_full, 50.0, 1.0))
        found += (weights > 1).sum().item()
    assert found > 1000


def test_closing_leaves_no_thread(store):
    before = set(threading.enumerate())
    with Loader(plan_of(store)) as loader:
        loader.batch(0)
        assert set(threading.enumerate()) > before
    assert set(threading.enumerate()) == before


def test_jumping_back_and_forth_gives_the_same_batches(store):
    straight = {step: low for step, (low, _, _) in enumerate(batches(store, range(12)))}
    order = [7, 3, 4, 11, 0, 1, 2]
    for step, (low, _, _) in zip(order, batches(store, order), strict=True):
        assert torch.equal(low, straight[step])


def test_blocks_held_stay_within_the_memory_budget(store):
    plan = plan_of(store, memory_mib=6)
    with Loader(plan) as loader:
        most = 0
        for step in range(40):
            batch = loader.batch(step)
            blocks = sum(f.result().memory.nbytes for doses in loader._blocks.values() for f in doses)
            batches = len(loader._batches) * 2 * batch.low.nbytes
            most = max(most, blocks + batches)
    assert 2 << 20 < most <= 6 << 20


def test_memory_is_used_again_but_never_while_somebody_holds_it(store):
    plan = plan_of(store, augment=NO_AUGMENT)
    with Loader(plan) as loader:
        kept = [loader.batch(step) for step in range(10)]
        copies = [batch.low.clone() for batch in kept]
        for step in range(10, 40):
            loader.batch(step)
        assert all(torch.equal(batch.low, copy) for batch, copy in zip(kept, copies, strict=True))
        addresses = {loader.batch(step).low.data_ptr() for step in range(40, 80)}
        assert len(addresses) <= 5


def test_a_budget_that_cannot_hold_the_lanes_is_refused(store):
    with pytest.raises(UserError, match=r"memory_mib=1 holds too few blocks"):
        Loader(plan_of(store, memory_mib=1))


@pytest.mark.parametrize(
    ("name", "ranks"), [("mayo2016_unet3d", 1), ("mayo2016_unet3d", 4), ("mayo2016_nafnet3d_xl_zero3", 4)]
)
def test_a_config_that_comes_along_has_the_memory_for_the_gpus_it_is_for(tmp_path, name, ranks):
    config = configs.read(RunConfig, CONFIGS / f"{name}.yaml")
    # Its blocks are of 32 MiB, those of 512 x 512 voxels of 30.
    large = make_store(tmp_path / "ct.zarr", [(128, 384, 384)])
    Loader(Plan(large, config.data, seed=5), 0, ranks).close()


def test_damage_is_named_where_it_is_met(tmp_path):
    store = make_store(tmp_path / "ct.zarr", [(20, 40, 40)])
    shard = tmp_path / "ct.zarr/cases/case-000/0.25/c/0/0/0"
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 1
    shard.write_bytes(raw)
    with (
        Loader(plan_of(store)) as loader,
        pytest.raises(UserError, match=r"case case-000 at dose 0\.25 is damaged"),
    ):
        loader.batch(0)


@pytest.mark.parametrize("augment", ["{}", '{"dose_mix": [0.5, 1.5]}', '{"lesions": {"count": 9}}'])
def test_a_gpu_gets_the_batches_of_a_cpu_over_pinned_memory_and_a_stream_of_their_own(store, augment):
    on_gpu(_same_batches, store.path, augment)


def _same_batches(path, augment):
    gpu = torch.device("cuda", 0)
    plan = plan_of(Store(path), augment=AugmentConfig.model_validate_json(augment))
    with Loader(plan) as on_cpu, Loader(plan, device=gpu) as on_its_own:
        for step in [*range(6), 1000, 1001]:
            expected, batch = on_cpu.batch(step), on_its_own.batch(step)
            for mine, theirs in zip(batch.tensors, expected.tensors, strict=True):
                assert (mine.device, mine.dtype) == (gpu, theirs.dtype)
                assert torch.equal((mine + 0).cpu(), theirs)  # used, as a step would
        assert on_its_own.air().low.device == gpu
