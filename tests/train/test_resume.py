"""A run that was interrupted is the unbroken run: bit for bit at the same number of ranks, to rounding at another."""

from __future__ import annotations

import re
import shutil
import signal
from functools import partial

import numpy as np
import pytest
from plants import asked_to_stop_at_every_step, nothing_may_be_deleted, random_loss, together

from forked import ForkedRanks, fork
from ldct_dist.checkpoint.retention import DISCARDED
from ldct_dist.files import TEMPORARY
from runs import equal, final_state, losses, starts, validations, write_config
from stores import make_store

STEPS = 5
# Two micro-batches a rank at 4 ranks, four at 2: gradients accumulate; 5 steps are a small part of an epoch.
EXACT = (
    *(f"steps={STEPS}", "data.crop=[4,16,16]", "data.batch=8", "micro_batch=1"),
    *("checkpoint.every=2", "validation.every=2"),
)
ONE_STEP = "time_limit_s=0.1"
PAIRS = [(2, 1), (2, 4), (4, 2), (1, 3)]
ELASTIC = ("data.batch=12", "data.crop=[4,8,8]", "validation.every=100", "checkpoint.every=100")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    shapes = [(16, 96, 96)] * 4 + [(4, 32, 32)]
    return make_store(tmp_path_factory.mktemp("resume") / "ct.zarr", shapes, ["train"] * 4 + ["val"]).path


@pytest.fixture(scope="module")
def unbroken(store, tmp_path_factory):
    """Runs that nothing disturbed, by number of ranks."""
    runs = {}
    for ranks in (2, 4):
        config = write_config(tmp_path_factory.mktemp("unbroken"), store)
        assert fork(config, *EXACT, ranks=ranks, plant=random_loss) == [0] * ranks
        runs[ranks] = config.parent / "runs" / "run"
    return runs


def test_a_run_that_was_done_when_it_was_started_again_keeps_nothing_of_killed_saves(store, tmp_path):
    config, checkpoints = write_config(tmp_path, store), tmp_path / "runs/run/checkpoints"
    assert fork(config, *EXACT) == [0, 0]
    kept = sorted(checkpoints.iterdir())
    for leftover in (f"{TEMPORARY}step-{STEPS:08d}-000001", f"{DISCARDED}step-{STEPS:08d}"):
        (checkpoints / leftover).mkdir()
        (checkpoints / leftover / "weights.safetensors").write_bytes(bytes(1000))
    assert fork(config, *EXACT) == [0, 0]
    assert sorted(checkpoints.iterdir()) == kept


def test_what_the_last_save_could_not_delete_is_said_once_as_after_any_other(store, tmp_path):
    config = write_config(tmp_path, store)
    few = (
        "data.crop=[4,16,16]",
        "steps=4",
        "checkpoint.every=1",
        "checkpoint.keep_last=3",
        "validation.every=100",
    )
    assert fork(config, *few, ranks=1, plant=nothing_may_be_deleted) == [0]
    assert config.with_suffix(".log").read_text().count("could not be deleted") == 1


@pytest.mark.parametrize("ranks", [2, 4])
def test_stopped_after_every_single_step_it_is_bitwise_the_unbroken_run(store, unbroken, tmp_path, ranks):
    """Losses, learning rates, gradient norms, weights, average, optimizer, random numbers and validations."""
    config, run = write_config(tmp_path, store), tmp_path / "runs" / "run"
    stop = partial(together, random_loss, asked_to_stop_at_every_step)
    for left in reversed(range(STEPS)):
        assert fork(config, *EXACT, ranks=ranks, plant=stop) == [75 if left else 0] * ranks
    assert fork(config, *EXACT, ranks=ranks, plant=random_loss) == [0] * ranks

    assert [start["from_step"] for start in starts(run)] == list(range(STEPS + 1))
    assert losses(run) == losses(unbroken[ranks])
    assert len({line["loss"] for line in losses(run)}) == STEPS
    assert equal(final_state(run), final_state(unbroken[ranks]))
    assert validations(run) == validations(unbroken[ranks])
    assert "sums are rounded differently" not in config.with_suffix(".log").read_text()


def test_killed_at_any_instant_it_is_bitwise_the_unbroken_run(store, unbroken, tmp_path):
    config, run = write_config(tmp_path, store), tmp_path / "runs" / "run"
    for step in (1, 3):
        with ForkedRanks(config, *EXACT, plant=random_loss) as running:
            running.wait_until(lambda step=step: (run / "losses.jsonl").exists() and len(losses(run)) >= step)
            running.signal(signal.SIGKILL)
            assert running.wait() == [-9, -9]
    assert fork(config, *EXACT, plant=random_loss) == [0, 0]
    assert losses(run) == losses(unbroken[2])
    assert equal(final_state(run), final_state(unbroken[2]))


@pytest.fixture(scope="module")
def two_ranks(store, tmp_path_factory):
    """Losses of unbroken runs of two ranks, by precision."""
    curves = {}
    for precision, steps in (("fp32", 2), ("fp64", 21)):
        folder = tmp_path_factory.mktemp(precision)
        config = write_config(folder, store)
        assert fork(config, *ELASTIC, f"precision={precision}", f"steps={steps}") == [0, 0]
        curves[precision] = [line["loss"] for line in losses(folder / "runs" / "run")]
    return curves


@pytest.mark.parametrize(("before", "after"), PAIRS)
@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_more_or_fewer_ranks_go_on_with_the_same_samples(
    store, two_ranks, tmp_path, precision, before, after
):
    """In fp64, for 20 steps; in fp32, the first step."""
    expected = two_ranks[precision]
    config = write_config(tmp_path, store)
    options = (*ELASTIC, f"precision={precision}", f"steps={len(expected)}")
    assert fork(config, *options, ONE_STEP, ranks=before) == [75] * before
    assert fork(config, *options, ranks=after) == [0] * after
    got = [line["loss"] for line in losses(tmp_path / "runs" / "run")]
    assert np.allclose(got, expected, rtol=1e-10 if precision == "fp64" else 1e-6, atol=0)
    assert starts(tmp_path / "runs" / "run")[1]["from_step"] == 1
    log = config.with_suffix(".log").read_text()
    assert f"note: ranks {before}, now {after}" in log


def test_a_batch_that_ranks_cannot_share_evenly_ends_all_of_them_before_anything_is_written(store, tmp_path):
    config = write_config(tmp_path, store)
    assert fork(config, ranks=3) == [2, 2, 2]
    assert "cannot be shared evenly by 3 ranks; use 1, 2, 4 ranks" in config.with_suffix(".log").read_text()
    assert not (tmp_path / "runs").exists()


def test_another_number_of_threads_is_said_with_the_way_back(store, tmp_path):
    config = write_config(tmp_path, store)
    log = config.with_suffix(".log")
    for threads in (1, 2):
        assert fork(config, ONE_STEP, f"threads={threads}", ranks=1) == [75]
    assert "note: threads 1, now 2: the samples stay the same" in log.read_text()
    assert "threads=1 would make them match" in log.read_text()
    assert [start["threads"] for start in starts(tmp_path / "runs" / "run")] == [1, 2]


def test_keys_that_are_safe_to_change_are_accepted_and_logged(store, tmp_path):
    config = write_config(tmp_path, store)
    assert fork(config, ONE_STEP, ranks=1) == [75]
    moved = tmp_path / "moved"
    shutil.move(tmp_path / "runs", moved)
    changes = ("steps=2", "log.every=1", "checkpoint.every=1", "validation.every=2", "data.threads=1")
    assert fork(config, f"runs={moved}", *changes, ranks=1) == [0]
    log = config.with_suffix(".log").read_text()
    for change in ("steps was 8, now 2", "log.every was 4, now 1", "checkpoint.every was 3, now 1"):
        assert f"changed since the last start: {change}" in log
    assert "resumed at step 1" in log
    # A first step may take minutes: every start says at once what it is about to do.
    assert re.findall(
        r"^training \S+ \(\S+ M parameters\); cases: \d+ \(train\), ranks: 1 \(.+\), figures every (\d+) steps$",
        log,
        re.MULTILINE,
    ) == ["4", "1"]


def test_any_other_key_is_refused_with_the_difference_and_the_way_out(store, tmp_path):
    config = write_config(tmp_path, store)
    assert fork(config, ONE_STEP, ranks=1) == [75]
    before = config.with_suffix(".log").read_text()
    assert fork(config, "optim.lr=0.5", "data.batch=2", "precision=bf16", ranks=1) == [2]
    (line,) = config.with_suffix(".log").read_text().removeprefix(before).splitlines()
    for difference in (
        "optim.lr was 0.001, now 0.5",
        "data.batch was 4, now 2",
        "precision was fp32, now bf16",
    ):
        assert difference in line
    assert "init_from=" in line
