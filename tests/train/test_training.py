from __future__ import annotations

import os
import signal
import time

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ldct_dist.cluster.local import LocalRanks
from ldct_dist.models.weights import load_weights
from runs import cli, final_state, losses, starts, train, unsharded, write_config
from stores import make_store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    shapes = [(10, 40, 40), (6, 48, 40), (12, 32, 32), (9, 40, 48), (8, 32, 40)]
    return make_store(tmp_path_factory.mktemp("train") / "ct.zarr", shapes, ["train"] * 4 + ["val"]).path


@pytest.fixture(scope="module")
def unbroken(store, tmp_path_factory):
    """A run of two ranks that nothing disturbed."""
    folder = tmp_path_factory.mktemp("unbroken")
    assert train(write_config(folder, store), ranks=2) == 0
    return folder / "runs" / "run"


def kill_when(running: LocalRanks, ready, number=signal.SIGKILL) -> None:
    deadline = time.monotonic() + 120
    while not ready():
        assert running.poll() is None, "training ended before it was to be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    running.signal(number)


def test_a_run_folder_explains_itself(unbroken):
    names = {p.name for p in unbroken.iterdir()}
    assert names == {
        "config.yaml",
        "environment.json",
        "checkpoints",
        "generations",
        "losses.jsonl",
        "tensorboard",
    }
    assert [line["step"] for line in losses(unbroken)] == list(range(1, 9))
    newest = max((unbroken / "checkpoints").iterdir())
    assert newest.name == "step-00000008"
    assert load_weights(newest / "weights.safetensors").config.size == "xs"
    board = EventAccumulator(str(unbroken / "tensorboard")).Reload()
    assert [e.step for e in board.Scalars("train/loss")] == [4, 8]
    assert [e.step for e in board.Scalars("validation/rmse_hu (ldctbench-abdomen)")] == [4, 8]
    assert board.Images("validation/low dose, denoised, full dose, difference")


def test_killed_and_started_again_is_bitwise_the_unbroken_run(store, unbroken, tmp_path):
    config = write_config(tmp_path, store)
    run = tmp_path / "runs" / "run"
    with LocalRanks(["train", str(config)], 2, tmp_path / "log") as running:
        kill_when(running, lambda: (run / "checkpoints" / "step-00000003").exists())
        running.wait()
    assert train(config, ranks=2) == 0
    assert starts(run)[0]["from_step"] == 0
    assert starts(run)[1]["from_step"] in (3, 4, 6)
    assert losses(run) == losses(unbroken)
    resumed, expected = final_state(run), final_state(unbroken)
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[k], expected[k]) for k in expected)


def test_asked_to_stop_it_saves_at_one_step_and_says_so_by_its_exit_code(store, unbroken, tmp_path):
    config = write_config(tmp_path, store)
    run = tmp_path / "runs" / "run"
    with LocalRanks(["train", str(config), "checkpoint.every=100"], 2, tmp_path / "log") as running:
        kill_when(running, lambda: (run / "losses.jsonl").exists() and losses(run), signal.SIGUSR1)
        assert running.wait() == 75
    saved = max((run / "checkpoints").iterdir())
    assert saved.name == f"step-{len(losses(run)):08d}"
    assert "start the same command again to go on" in (tmp_path / "log").read_text()
    assert train(config, "checkpoint.every=100", ranks=2) == 0
    assert losses(run) == losses(unbroken)


@pytest.mark.parametrize("ranks", [1, 4])
def test_more_or_fewer_ranks_go_on_with_the_same_samples(store, unbroken, tmp_path, ranks):
    config = write_config(tmp_path, store)
    run = tmp_path / "runs" / "run"
    assert train(config, "time_limit_s=0.1", ranks=2) == 75  # stops after its first step
    done = len(losses(run))
    assert train(config, ranks=ranks) == 0
    resumed, expected = losses(run), losses(unbroken)
    assert resumed[:done] == expected[:done]
    assert resumed[done]["loss"] == pytest.approx(expected[done]["loss"], rel=1e-6)
    assert [r["loss"] for r in resumed] == pytest.approx([e["loss"] for e in expected], rel=1e-4)


def test_in_float64_the_number_of_ranks_makes_no_difference_to_speak_of(store, tmp_path):
    curves = []
    for ranks in (1, 4):
        (tmp_path / str(ranks)).mkdir()
        config = write_config(tmp_path / str(ranks), store)
        assert train(config, "precision=fp64", "steps=5", "validation.every=9", ranks=ranks) == 0
        curves.append([line["loss"] for line in losses(tmp_path / str(ranks) / "runs" / "run")])
    assert np.allclose(*curves, rtol=1e-10, atol=0)


def test_gradients_accumulated_over_micro_batches_are_those_of_the_whole(store, unbroken, tmp_path):
    config = write_config(tmp_path, store)
    assert train(config, "micro_batch=1", "steps=3", ranks=2) == 0
    got = [line["loss"] for line in losses(tmp_path / "runs" / "run")]
    # steps is also the end of the learning-rate curve: only the first step is the same
    assert got[0] == pytest.approx(losses(unbroken)[0]["loss"], rel=1e-6)
    state = unsharded(final_state(tmp_path / "runs" / "run"))
    assert all(torch.isfinite(t).all() for t in state.values())


def test_another_config_in_the_same_folder_is_refused_with_the_difference(store, unbroken, tmp_path):
    config = write_config(tmp_path, store)
    overrides = [f"runs={unbroken.parent}", "optim.lr=0.5"]
    refused = cli("train", config, *overrides)
    assert refused.returncode == 2
    assert "optim.lr was 0.001, now 0.5" in refused.stderr
    assert "init_from=" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1


def test_fine_tuning_starts_from_the_weights_and_is_called_that(store, unbroken, tmp_path):
    config = write_config(tmp_path, store)
    weights = max((unbroken / "checkpoints").iterdir()) / "weights.safetensors"
    done = cli("train", config, f"init_from={weights}", "steps=1", "validation.every=9")
    assert done.returncode == 0, done.stderr
    assert "not a resume" in done.stdout
    assert "resumed" not in done.stdout


def test_mistakes_are_one_line_and_exit_code_2(store, tmp_path):
    config = write_config(tmp_path, store)
    for arguments, words in (
        (["train", tmp_path / "no.yaml"], "no such config file"),
        (["train", config, "optim.lrr=1"], "optim.lrr"),
        (["train", config, f"store={tmp_path}"], "not a store"),
        (["train", config, "data.split=nowhere"], "no case in split 'nowhere'"),
        (["train", config, "data.batch=3", "model.size=q"], "comes in xs, s"),
        (["train", config, "name=../escape"], "name"),
        (["train", config, "data.crop=[8,20,24]"], "multiple"),
    ):
        refused = cli(*arguments)
        assert refused.returncode == 2, refused.stderr
        assert words in refused.stderr
        assert len(refused.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "escape").exists()


def test_a_step_with_non_finite_loss_changes_nothing_on_any_rank(store, tmp_path):
    """An absurd learning rate makes the network overflow; the run goes on, and counts the steps it skipped."""
    config = write_config(tmp_path, store)
    assert train(config, "optim.lr=1e30", "optim.warmup=0", "validation.every=9", ranks=2) == 0
    lines = losses(tmp_path / "runs" / "run")
    assert any(not line["applied"] for line in lines)
    assert all(
        torch.isfinite(t).all() or "weights" in k for k, t in final_state(tmp_path / "runs" / "run").items()
    )
    assert os.path.exists(tmp_path / "runs" / "run" / "checkpoints" / "step-00000008" / "MANIFEST.json")
