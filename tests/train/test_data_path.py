"""What training does with a store: reads it from a copy, stops where it is damaged, refuses another one."""

from __future__ import annotations

import shutil
from functools import partial

import pytest
from plants import given_otherwise, memory_runs_out_in_validation

from forked import fork
from ldct_dist.config import read
from ldct_dist.data.plan import Plan
from ldct_dist.models.weights import save_weights
from ldct_dist.train.config import RunConfig
from ldct_dist.train.run import RunFolder
from networks import random_network
from runs import equal, final_state, losses, starts, write_config
from stores import make_store

SHAPES = [(10, 40, 40), (9, 48, 40), (12, 32, 32), (8, 40, 48)] * 3


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(
        tmp_path_factory.mktemp("data") / "ct.zarr", [*SHAPES, (8, 32, 40)], ["train"] * 12 + ["val"]
    )


@pytest.fixture(scope="module")
def unbroken(store, tmp_path_factory):
    """A run of two ranks that reads the store itself."""
    folder = tmp_path_factory.mktemp("unbroken")
    assert fork(write_config(folder, store.path)) == [0, 0]
    return folder / "runs" / "run"


def flip_a_bit(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def first_read(store, config):
    """The step at which each case is first read."""
    plan = Plan(store, config.data, config.seed)
    steps = {}
    for step in range(config.steps):
        for crop in plan.crops(step):
            steps.setdefault(crop.block.case, step)
    return steps


def errors(log):
    """The lines of a log that tell of something wrong."""
    return [line for line in log.read_text().splitlines() if "rror" in line or "Traceback" in line]


def test_a_run_with_copies_on_its_node_is_bitwise_the_run_without(store, unbroken, tmp_path):
    assert fork(write_config(tmp_path, store.path), f"data.stage={tmp_path}") == [0, 0]
    assert losses(tmp_path / "runs" / "run") == losses(unbroken)
    lines = [line for line in (tmp_path / "run.log").read_text().splitlines() if "data.stage" in line]
    assert len(lines) == 1, "one rank copies for the node"
    assert "26 arrays" in lines[0], "of 12 cases to train on and one to validate on"


def test_where_copies_lie_may_change_from_start_to_start(store, unbroken, tmp_path):
    config = read(RunConfig, write_config(tmp_path, store.path), [f"runs={unbroken.parent}", "data.stage=/x"])
    assert "data.stage was None, now /x" in RunFolder(unbroken).open(config)


@pytest.mark.parametrize("ranks", [1, 2])
def test_damage_ends_training_with_one_line_that_names_the_case(store, unbroken, tmp_path, ranks):
    damaged = shutil.copytree(store.path, tmp_path / "ct.zarr")
    config = write_config(tmp_path, damaged)
    case, step = max(first_read(store, read(RunConfig, config)).items(), key=lambda item: item[1])
    assert step > 2
    shard = damaged / "cases" / case / "0.25/c/0/0/0"
    flip_a_bit(shard)
    assert fork(config, ranks=ranks) == [2] * ranks
    (line,) = errors(tmp_path / "run.log")
    assert line.startswith("error:")
    assert f"case {case} at dose 0.25 is damaged" in line
    run = tmp_path / "runs" / "run"
    assert len(losses(run)) == step
    assert max(p.name for p in (run / "checkpoints").iterdir()) == f"step-{step:08d}"
    if ranks == 2:  # and once the case is whole again, training goes on as if nothing had been
        flip_a_bit(shard)
        assert fork(config) == [0, 0]
        assert losses(run) == losses(unbroken)


def test_damage_met_in_validation_ends_all_ranks_too_and_no_step_is_lost(store, tmp_path):
    damaged = shutil.copytree(store.path, tmp_path / "ct.zarr")
    flip_a_bit(damaged / "cases/case-012/1.00/c/0/0/0")
    config, run = write_config(tmp_path, damaged), tmp_path / "runs" / "run"
    for start in (1, 2):
        assert fork(config, "validation.every=2") == [2, 2]
        lines = errors(tmp_path / "run.log")
        assert len(lines) == start
        assert "case case-012 at dose 1.00 is damaged" in lines[-1]
        assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000002"]
    assert [start["from_step"] for start in starts(run)] == [0, 2]


def test_a_case_that_cannot_be_measured_ends_all_ranks_in_one_line_that_names_it(tmp_path):
    shapes = [(10, 40, 40), (8, 32, 40), (4, 32, 40)]  # rank 1's, the last, is too short for a window
    few = make_store(tmp_path / "ct.zarr", shapes, ["train", "val", "val"]).path
    options = ("validation.every=1", "validation.protocol=ldctbench-abdomen-3d")
    assert fork(write_config(tmp_path, few), *options) == [2, 2]
    (line,) = errors(tmp_path / "run.log")
    assert line.startswith("error: validation on case-002: ")
    assert "4 slices of (32, 40)" in line
    assert (tmp_path / "runs/run/checkpoints/step-00000001").exists()


def test_a_case_too_large_for_memory_ends_all_ranks_in_one_line_that_names_it_and_no_step_is_lost(tmp_path):
    shapes = [(10, 40, 40), (8, 32, 40), (8, 32, 40)]
    few = make_store(tmp_path / "ct.zarr", shapes, ["train", "val", "val"]).path
    config = write_config(tmp_path, few)
    assert fork(config, "validation.every=1", plant=memory_runs_out_in_validation) == [2, 2]
    (line,) = errors(tmp_path / "run.log")
    assert line.startswith("error: validation on case-002: rank 1 on ")
    assert "memory ran out (can't allocate memory: you tried to allocate 1125899906842624 bytes)" in line
    assert (tmp_path / "runs/run/checkpoints/step-00000001").exists()


def test_a_store_that_cannot_be_opened_is_one_line_from_all_ranks_together(store, tmp_path):
    damaged = shutil.copytree(store.path, tmp_path / "ct.zarr")
    flip_a_bit(damaged / "catalogue.parquet")
    assert fork(write_config(tmp_path, damaged)) == [2, 2]
    (line,) = (tmp_path / "run.log").read_text().splitlines()
    assert "catalogue.parquet is damaged" in line


def test_ranks_with_different_configs_or_stores_are_refused_before_anything_is_written(store, tmp_path):
    """As where a file, or a node's view of it, changed amid the start: each rank would go its own way unseen."""
    other = make_store(tmp_path / "other.zarr", SHAPES, ["train"] * 11 + ["val"], noise=50.0)
    config = write_config(tmp_path, store.path)
    for given, told in (
        (["optim.lr=0.5", "data.batch=8"], "data.batch 8, not 4; optim.lr 0.5, not 0.001"),
        ([f"store={other.path}"], f"store's fingerprint {other.fingerprint}, not {store.fingerprint}"),
    ):
        assert fork(config, plant=partial(given_otherwise, given)) == [2, 2]
        (line,) = errors(tmp_path / "run.log")
        assert line.startswith("error: rank 1 on ")
        assert f"was given other settings than rank 0: {told}; start" in line
        (tmp_path / "run.log").unlink()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("options", [[], ["strategy=deepspeed", "zero=1"]], ids=["ddp", "zero-1"])
def test_all_ranks_begin_with_the_weights_of_the_first(store, tmp_path, options):
    """Where init_from is on a node's own disk, one network would be put together from several."""
    ours, theirs = (tmp_path / f"{name}.safetensors" for name in ("ours", "theirs"))
    save_weights(ours, random_network("unet3d"))
    save_weights(theirs, random_network("unet3d", gain=1.0))
    config = write_config(tmp_path, store.path, steps=1, init_from=str(ours))
    assert fork(config, "name=same", *options) == [0, 0]
    other = partial(given_otherwise, [f"init_from={theirs}"])
    assert fork(config, "name=other", *options, plant=other) == [0, 0]
    same, other = (final_state(tmp_path / "runs" / name) for name in ("same", "other"))
    assert equal(other, same)


@pytest.mark.parametrize("key", ["store", "threads", "init_from"])
def test_what_is_a_nodes_own_may_differ(store, tmp_path, key):
    copy = shutil.copytree(store.path, tmp_path / "on-its-disk.zarr")
    weights, copied = tmp_path / "weights.safetensors", tmp_path / "on-its-disk.safetensors"
    save_weights(weights, random_network("unet3d"))
    shutil.copyfile(weights, copied)
    given = {"store": f"store={copy}", "threads": "threads=2", "init_from": f"init_from={copied}"}[key]
    config = write_config(tmp_path, store.path, steps=1, init_from=str(weights))
    assert fork(config, plant=partial(given_otherwise, [given])) == [0, 0]


def test_a_run_that_goes_on_does_not_need_the_weights_it_began_with(store, tmp_path):
    weights = tmp_path / "weights.safetensors"
    save_weights(weights, random_network("unet3d"))
    config = write_config(tmp_path, store.path, steps=1, init_from=str(weights))
    assert fork(config) == [0, 0]
    weights.unlink()
    assert fork(config, "steps=2") == [0, 0]


def test_another_store_is_refused_unless_that_is_said(unbroken, tmp_path):
    other = make_store(tmp_path / "ct.zarr", [*SHAPES, (8, 32, 40)], ["train"] * 12 + ["val"], noise=60.0)
    shutil.copytree(unbroken, tmp_path / "runs" / "run")
    config = write_config(tmp_path, other.path)
    log = tmp_path / "run.log"
    assert fork(config, "steps=9") == [2, 2]
    claims = tmp_path / "runs" / "run" / "generations"
    assert [claim.name for claim in claims.iterdir()] == ["000001"], (
        "or a start that runs would have to leave"
    )
    (line,) = errors(log)
    assert "is not the store that" in line
    assert "--allow-new-data" in line
    assert fork(config, "steps=9", "--allow-new-data") == [0, 0]
    assert f"from step 8 on this run trains on {other.path}" in log.read_text()
    assert fork(config, "steps=10") == [0, 0], "its checkpoints are of this store now"
