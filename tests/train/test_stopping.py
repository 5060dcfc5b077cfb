"""Asked to stop, a run saves and says by its exit code that it can go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from plants import asked_to_stop, asked_to_stop_in_validation

from forked import ForkedRanks, fork
from ldct_dist.train.stop import SIGNALS, Stop
from runs import final_state, losses, validations, write_config
from stores import make_store

OPTIONS = ("data.crop=[4,16,16]", "steps=80", "validation.every=40", "checkpoint.every=100", "log.every=40")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    shapes = [(10, 40, 40), (6, 48, 40), (12, 32, 32), (9, 40, 48), *[(4, 32, 32)] * 3]
    splits = ["train"] * 4 + ["val"] * 3
    return make_store(tmp_path_factory.mktemp("stopping") / "ct.zarr", shapes, splits).path


@pytest.fixture(scope="module")
def unbroken(store, tmp_path_factory):
    config = write_config(tmp_path_factory.mktemp("unbroken"), store)
    assert fork(config, *OPTIONS) == [0, 0]
    return config.parent / "runs" / "run"


def test_each_signal_to_any_rank_stops_all_ranks_at_one_step_which_is_saved(store, unbroken, tmp_path):
    config = write_config(tmp_path, store)
    run, log = tmp_path / "runs" / "run", config.with_suffix(".log")
    for i, number in enumerate(SIGNALS):
        before = len(losses(run)) if i else 0
        with ForkedRanks(config, *OPTIONS, "grace_s=0.001") as running:
            running.wait_until(lambda n=before: (run / "losses.jsonl").exists() and len(losses(run)) > n)
            running.signal(number, i % 2)
            assert running.wait() == [75, 75]
        step = len(losses(run))
        assert max((run / "checkpoints").iterdir()).name == f"step-{step:08d}"
        assert f"stopped at step {step} (" in log.read_text()
        assert "start the same command again to go on" in log.read_text()
    assert fork(config, *OPTIONS, "grace_s=0.001") == [0, 0]
    assert losses(run) == losses(unbroken)
    assert all((t == final_state(unbroken)[k]).all() for k, t in final_state(run).items())


def test_a_stop_during_a_validation_does_not_wait_for_it_and_the_next_start_does_it_again(
    store, unbroken, tmp_path
):
    config = write_config(tmp_path, store)
    run = tmp_path / "runs" / "run"
    assert fork(config, *OPTIONS, plant=asked_to_stop_in_validation) == [75, 75]
    assert len(losses(run)) == 40
    assert "validation " not in config.with_suffix(".log").read_text()
    assert fork(config, *OPTIONS) == [0, 0]
    assert validations(run) == validations(unbroken)
    assert losses(run) == losses(unbroken)


def test_a_job_too_short_for_its_validation_comes_to_its_next_step_all_the_same(store, tmp_path):
    config = write_config(tmp_path, store)
    options = ("data.crop=[4,16,16]", "validation.every=1", "steps=3", "time_limit_s=0.1")
    assert [fork(config, *options, ranks=1) for _ in range(5)] == [[75]] * 5
    assert len(losses(tmp_path / "runs" / "run")) == 3


def test_a_stop_in_the_last_step_is_the_end_of_the_run_not_a_reason_to_start_it_again(store, tmp_path):
    config = write_config(tmp_path, store)
    last = ("data.crop=[4,16,16]", "steps=3", "validation.every=100")
    assert fork(config, *last, plant=partial(asked_to_stop, 2)) == [0, 0]
    assert "done: 3 steps" in config.with_suffix(".log").read_text()


def test_a_grace_too_short_for_a_save_is_said_once_a_start(store, tmp_path):
    config = write_config(tmp_path, store)
    short = ("data.crop=[4,16,16]", "steps=4", "checkpoint.every=1", "validation.every=100")
    assert fork(config, *short, "grace_s=0.001", ranks=1) == [0]
    assert config.with_suffix(".log").read_text().count("longer than grace_s=0.001") == 1
    roomy = tmp_path / "roomy"
    roomy.mkdir()
    config = write_config(roomy, store)
    assert fork(config, *short, ranks=1) == [0]
    assert "grace_s" not in config.with_suffix(".log").read_text()


def test_near_its_time_limit_a_run_stops_while_a_step_and_two_saves_still_fit(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() + 1000))
    for stop in (Stop(limit_s=1000), Stop()):
        stop.step_s, stop.save_s = 100, 440
        assert not stop.wanted
        stop.save_s = 460
        assert stop.wanted
        assert stop.reason == "the time limit is near"
    monkeypatch.delenv("SLURM_JOB_END_TIME")
    endless = Stop()
    endless.save_s = 1e9
    assert not endless.wanted


def test_a_second_interrupt_ends_the_process_even_inside_a_call_that_does_not_return():
    script = (
        "import ctypes; from ldct_dist.train.stop import Stop\n"
        "with Stop() as stop:\n"
        "    print('ready', flush=True)\n"
        "    while stop.reason is None: pass\n"
        "    print(stop.reason, flush=True)\n"
        "    ctypes.PyDLL(None).sleep(100)"  # keeps the interpreter's lock
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "SIGINT arrived\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == -signal.SIGINT


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.reason == "SIGINT arrived"
    assert [signal.getsignal(number) for number in SIGNALS] == before
