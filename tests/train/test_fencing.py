"""A start of a run that wakes up after a newer one has taken over: it leaves, and changes nothing."""

from __future__ import annotations

import signal

from forked import ForkedRanks, fork
from runs import losses, starts, write_config
from stores import make_store


def contents(run) -> dict[str, bytes]:
    """Every file of the run, but for the TensorBoard files and the claims, of which each start has its own."""
    own = ("tensorboard", "generations")
    files = [p for p in run.rglob("*") if p.is_file() and p.relative_to(run).parts[0] not in own]
    return {str(p.relative_to(run)): p.read_bytes() for p in files}


def test_a_start_that_slept_while_a_newer_one_ran_to_the_end_is_fenced(tmp_path):
    store = make_store(tmp_path / "ct.zarr", [(10, 40, 40), (8, 40, 40)], ["train", "train"]).path
    quick = {"data": {"crop": [4, 16, 16]}, "validation": {"every": 1_000_000}, "checkpoint": {"every": 50}}
    config = write_config(tmp_path, store, steps=100_000, **quick)
    run = tmp_path / "runs" / "run"
    with ForkedRanks(config) as old:
        old.wait_until(lambda: len(losses(run)) >= 60)
        old.signal(signal.SIGSTOP)
        end = len(losses(run)) + 40
        assert fork(config, f"steps={end}") == [0, 0]
        finished = contents(run)
        old.signal(signal.SIGCONT)
        assert old.wait() == [70, 70]
    assert contents(run) == finished
    assert [line["step"] for line in losses(run)] == list(range(1, end + 1))
    assert len(starts(run)) == 2
    assert "a newer start of this run has taken over" in config.with_suffix(".log").read_text()
