"""Steps that would spoil the weights: skipped together, gone back on, and in the end given up on by name."""

from __future__ import annotations

import json
import math
import signal
from functools import partial

import pytest
from plants import asked_to_stop, poisoned_average, spoilt, steep, together

from forked import ForkedRanks, fork
from ldct_dist.train.guard import WINDOW, Guard
from runs import board, equal, final_state, losses, write_config
from stores import make_store

OPTIONS = ("data.crop=[4,16,16]", "checkpoint.every=2", "validation.every=100", "guard.patience=3")
NAN = math.nan
# Three batches in a row that cannot be learnt from; long after them one whose loss leaps, and one whose gradient
# is not finite although its loss is.
BAD = {5: NAN, 6: NAN, 7: NAN, 45: 1e3}
STEEP = 47
STEPS = 46


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    shapes = [(10, 40, 40), (6, 48, 40), (12, 32, 32), (9, 40, 48), (4, 32, 32), (4, 32, 32)]
    splits = ["train"] * 4 + ["val"] * 2
    return make_store(tmp_path_factory.mktemp("guard") / "ct.zarr", shapes, splits).path


planted = partial(together, partial(spoilt, BAD), partial(steep, STEEP))


@pytest.fixture(scope="module")
def unbroken(store, tmp_path_factory):
    """A run that meets all of it, and its printed lines."""
    config = write_config(tmp_path_factory.mktemp("unbroken"), store)
    assert fork(config, *OPTIONS, f"steps={STEPS}", plant=planted) == [0, 0]
    return config.parent / "runs" / "run", config.with_suffix(".log").read_text()


def counters(run) -> dict:
    newest = max((run / "checkpoints").glob("step-*"))
    return json.loads((newest / "MANIFEST.json").read_text())["manifest"]["state"]


def test_a_bad_stretch_leads_back_to_the_checkpoint_before_it_and_on_with_other_data(unbroken):
    run, log = unbroken
    # Batches 5 to 7 were steps 6 to 8. No checkpoint is made within the stretch: step 4 is the one before it.
    assert "3 steps in a row were skipped, up to step 8: went back to step 4, goes on with batch 8" in log
    assert log.count("went back") == 1
    state = counters(run)
    assert (state["step"], state["moved"], state["guard"]["rollbacks"]) == (STEPS, 4, 1)
    assert [line["step"] for line in losses(run)] == list(range(1, STEPS + 1))


def test_skipped_steps_change_nothing_are_counted_and_named(unbroken):
    run, log = unbroken
    skipped = [line["step"] for line in losses(run) if not line["applied"]]
    assert skipped == [45 - 4 + 1, STEEP - 4 + 1]
    assert counters(run)["guard"]["skipped"] == 3 + 2
    lines = [line for line in log.splitlines() if "skipped:" in line]
    assert "step 6 skipped: the loss is not finite: case-00" in lines[0]
    assert "(lane 1, block at [" in lines[0]
    assert "step 42 skipped: the loss leapt from" in lines[3]
    assert "(lane 1, block at [" in lines[3]
    assert "step 44 skipped: the gradient is not finite" in lines[4]
    assert all(t.isfinite().all() for t in final_state(run).values())


def test_killed_after_going_back_it_is_bitwise_the_unbroken_run(store, unbroken, tmp_path):
    config = write_config(tmp_path, store)
    run = tmp_path / "runs" / "run"
    for ready in (
        lambda lines: len(lines) > 8,
        lambda lines: any(not line["applied"] for line in lines[40:]),
    ):
        with ForkedRanks(config, *OPTIONS, f"steps={STEPS}", plant=planted) as running:
            running.wait_until(lambda r=ready: (run / "losses.jsonl").exists() and r(losses(run)))
            running.signal(signal.SIGKILL)
            running.wait()
    assert fork(config, *OPTIONS, f"steps={STEPS}", plant=planted) == [0, 0]
    assert losses(run) == losses(unbroken[0])
    assert counters(run) == counters(unbroken[0])
    assert equal(final_state(run), final_state(unbroken[0]))


@pytest.mark.parametrize("batch", [4, 6])
def test_stopped_just_before_a_bad_stretch_or_within_it_is_bitwise_the_unbroken_run(
    store, unbroken, tmp_path, batch
):
    """It goes back to where that one does, not to what was saved at the stop."""
    config = write_config(tmp_path, store)
    run = tmp_path / "runs" / "run"
    stopped = partial(together, planted, partial(asked_to_stop, batch))
    assert fork(config, *OPTIONS, f"steps={STEPS}", plant=stopped) == [75, 75]
    assert (run / "checkpoints" / f"step-{batch + 1:08d}").exists()
    assert fork(config, *OPTIONS, f"steps={STEPS}", plant=planted) == [0, 0]
    assert losses(run) == losses(unbroken[0])
    assert counters(run) == counters(unbroken[0])
    assert equal(final_state(run), final_state(unbroken[0]))


def test_what_going_back_does_not_help_ends_the_run_with_the_samples_named(store, tmp_path):
    config = write_config(tmp_path, store)
    plant = partial(spoilt, dict.fromkeys(range(2, 100), NAN))
    assert fork(config, *OPTIONS, "checkpoint.every=100", "guard.rollbacks=2", plant=plant) == [65, 65]
    log = config.with_suffix(".log").read_text()
    # Without a checkpoint, back is where the run began.
    assert log.count("went back to step 0") == 2
    (line,) = [line for line in log.splitlines() if line.startswith("error:")]
    assert "3 steps in a row were skipped, up to step 3, after going back 2 times" in line
    assert line.count("(lane 1, block at [") == 3


def test_a_validation_that_is_not_finite_on_one_rank_is_said_and_training_goes_on(store, tmp_path):
    config = write_config(tmp_path, store)
    options = (*OPTIONS, "validation.every=1", "steps=2")
    assert fork(config, *options, plant=poisoned_average) == [0, 0]
    log = config.with_suffix(".log").read_text()
    assert log.count("case-005: the network's answer is not finite") == 2
    run = tmp_path / "runs" / "run"
    assert counters(run)["best"] is None
    shown = board(run)
    assert not [tag for tag in shown.Tags()["scalars"] if tag.startswith("validation")]


def test_only_a_loss_far_above_the_running_median_is_a_leap():
    guard = Guard()
    for loss in range(WINDOW // 2 - 1):
        guard.applied(10.0 + loss % 3)
    assert guard.fault(1e6, True, spike=20) is None  # too little is known yet
    guard.applied(10.0)
    assert guard.fault(219.0, True, spike=20) is None
    assert "leapt from 11 to 221" in guard.fault(221.0, True, spike=20)
    assert guard.fault(1e6, True, spike=None) is None
    assert guard.fault(10.0, False, spike=None) == "the gradient is not finite"
    assert guard.fault(math.inf, True, spike=None) == "the loss is not finite"


def test_the_running_median_forgets():
    guard = Guard()
    for loss in [1000.0] * WINDOW + [10.0] * WINDOW:
        guard.applied(loss)
    assert len(guard.recent) == WINDOW
    assert guard.fault(300.0, True, spike=20) is not None


def test_an_applied_step_ends_the_stretch():
    guard = Guard()
    guard.skip("a")
    guard.skip("b")
    assert guard.stretch == ["a", "b"]
    guard.applied(1.0)
    assert (guard.stretch, guard.skipped) == ([], 2)


def test_stopped_after_going_back_before_a_checkpoint_of_the_best_it_goes_on_from_the_stop(store, tmp_path):
    """Step 6 is saved as the best so far, step 4 as a regular one; batches 6 to 8 are steps 7 to 9."""
    config = write_config(tmp_path, store)
    options = (*OPTIONS, "checkpoint.every=4", "validation.every=6", "steps=10")
    bad = partial(spoilt, dict.fromkeys((6, 7, 8), NAN))
    assert fork(config, *options, plant=partial(together, bad, partial(asked_to_stop, 9))) == [75, 75]
    log = config.with_suffix(".log")
    assert "went back to step 4, goes on with batch 9" in log.read_text()
    assert fork(config, *options, plant=bad) == [0, 0]
    assert "resumed at step 5 from" in log.read_text()
    assert log.read_text().count("went back") == 1
