"""A rank that stops is named by the others, which leave; the same command again goes on as if nothing had been."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from plants import killed, raising, stopped, stuck, unreached

from forked import ForkedRanks, fork
from ldct_dist.cluster.local import LocalRanks
from ldct_dist.errors import UserError
from ldct_dist.train.watch import LEFT, LOOKS, Beat, Seen, Watch
from ldct_dist.world import World
from runs import same, write_config
from stores import make_store

OPTIONS = ("data.crop=[4,16,16]", "steps=6", "checkpoint.every=1", "validation.every=100")
HANG_S = 6.0
BATCH = 3


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    shapes = [(10, 40, 40), (6, 48, 40), (12, 32, 32), (9, 40, 48)]
    return make_store(tmp_path_factory.mktemp("watch") / "ct.zarr", shapes, ["train"] * 4).path


@pytest.fixture(scope="module")
def unbroken(store, tmp_path_factory):
    config = write_config(tmp_path_factory.mktemp("unbroken"), store)
    assert fork(config, *OPTIONS) == [0, 0]
    return config.parent / "runs" / "run"


PLANTS = {
    "rank 0 stopped": partial(stopped, 0, BATCH),
    "rank 1 stopped": partial(stopped, 1, BATCH),
    "rank 1 stuck": partial(stuck, 1, BATCH),
    "rank 1 stuck at once": partial(stuck, 1, 0),
    "rank 1 unreached": unreached,
}


@pytest.fixture(scope="module")
def hung(store, tmp_path_factory):
    """Five runs of two ranks that hang, one after a SIGSTOP from outside, and how each ended.

    At once, since they mostly wait.
    """
    folders = {name: tmp_path_factory.mktemp("hung") for name in PLANTS}
    running, ended = {}, {}
    try:
        for name, plant in PLANTS.items():
            config = write_config(folders[name], store)
            running[name] = ForkedRanks(config, *OPTIONS, f"hang_s={HANG_S}", plant=plant)
        for name, ranks in running.items():
            survivors = {"rank 0 stopped": [1], "rank 1 stopped": [0]}.get(name, [0, 1])
            ended[name] = (folders[name], ranks.wait(*survivors))
    finally:
        for ranks in running.values():
            ranks.__exit__()
    return ended


@pytest.mark.parametrize(
    ("name", "line"),
    [
        (
            "rank 0 stopped",
            r"no answer for 6 s from rank 0 on HOST \(last seen at step [0-3], .*\); rank 1 on HOST",
        ),
        (
            "rank 1 stopped",
            r"no answer for 6 s from rank 1 on HOST \(last seen at step [0-3], .*\); rank 0 on HOST",
        ),
        (
            "rank 1 stuck",
            r"no progress for 6 s on rank 1 on HOST \(last seen at step 3, data\); rank 0 on HOST",
        ),
        (
            "rank 1 stuck",
            r"no progress for 6 s on rank 1 on HOST \(last seen at step 3, data\); rank 1 on HOST",
        ),
    ],
)
def test_the_others_name_it_with_host_step_and_phase_and_leave(hung, name, line):
    folder, codes = hung[name]
    assert set(codes) == {76}
    line = line.replace("HOST", re.escape(socket.gethostname()))
    assert re.search(line + r" \(at step 3, (data|backward)\) leaves", (folder / "run.log").read_text())


def test_before_anything_was_saved_it_is_another_exit_code(hung):
    """A scheduler that starts the run again would have it hang there again, and again."""
    _, codes = hung["rank 1 stuck at once"]
    assert set(codes) == {77}


def test_ranks_that_do_not_reach_each_other_do_not_wait_for_ever(hung):
    folder, codes = hung["rank 1 unreached"]
    assert set(codes) == {77}
    assert re.search(
        r"no progress for 6 s on rank 0 .* \(last seen at step 0, first pass\)",
        (folder / "run.log").read_text(),
    )


def test_stacks_of_all_threads_lie_in_the_run_folder(hung):
    folder, _ = hung["rank 1 stuck"]
    generation = folder / "runs" / "run" / "generations" / "000001"
    waiting, asleep = ((generation / f"rank-0000{r}.stacks").read_text() for r in (0, 1))
    assert "in backward" in waiting
    assert "plants.py" in asleep
    assert waiting.count("hread 0x") >= 2


@pytest.mark.parametrize("name", list(PLANTS))
def test_started_again_it_is_bitwise_the_unbroken_run(hung, unbroken, name):
    folder, _ = hung[name]
    config, run = folder / "run.yaml", folder / "runs" / "run"
    assert fork(config, *OPTIONS) == [0, 0]
    assert same(run, unbroken)
    # What the ranks told each other is gone with them.
    assert list((run / "generations" / "000002").iterdir()) == []


@pytest.mark.parametrize("plant", [killed, raising])
def test_of_a_rank_that_is_gone_the_others_say_one_line_and_the_run_goes_on(store, unbroken, tmp_path, plant):
    """As after an OOM kill: gloo tells of it at once, and would have each of them end with a traceback and 1."""
    config = write_config(tmp_path, store)
    codes = fork(config, *OPTIONS, f"hang_s={HANG_S}", plant=partial(plant, BATCH))
    assert codes == [76, {killed: -signal.SIGKILL, raising: 1}[plant]]
    log, host = config.with_suffix(".log").read_text(), re.escape(socket.gethostname())
    assert re.search(
        rf"another rank is gone \(.*peer\b.*\); rank 0 on {host} \(at step 3, \w+\) leaves with exit code 76",
        log,
    )
    assert log.count("Traceback") == (plant is raising)
    assert fork(config, *OPTIONS) == [0, 0]
    assert same(tmp_path / "runs" / "run", unbroken)


def test_a_gpu_that_is_full_is_one_line_that_says_what_to_do(store, tmp_path):
    told = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity of 79.15 GiB of which 1.12 GiB is free"
    full = torch.OutOfMemoryError(
        f"{told}. Including non-PyTorch memory, this process has 77 GiB in use. Of the"
    )
    config = write_config(tmp_path, store)
    assert fork(config, *OPTIONS, f"hang_s={HANG_S}", plant=partial(raising, BATCH, error=full)) == [76, 2]
    log = config.with_suffix(".log").read_text()
    assert f"error: {socket.gethostname()}: {told}; lower micro_batch, or set " in log
    assert "Traceback" not in log


def test_stopped_from_outside_and_launched_here_the_stopped_rank_is_ended_too(store, tmp_path):
    config = write_config(tmp_path, store)
    run = tmp_path / "runs" / "run"
    options = ("data.crop=[4,16,16]", "steps=999999", "validation.every=1000000", f"hang_s={HANG_S}")
    with LocalRanks(["train", str(config), *options], 2, tmp_path / "log") as running:
        deadline = time.monotonic() + 120
        while len(list((run / "checkpoints").glob("step-*"))) < 2:  # so the first is known to all ranks
            assert running.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(running.processes[1].pid, signal.SIGSTOP)
        assert running.wait() == 76
        assert running.processes[1].returncode == -signal.SIGKILL
    assert "rank 1 on" in (tmp_path / "log").read_text()


def beat(alive: int, phases: int, ticks: int = 0, patience: float = 1.0) -> Beat:
    return Beat(alive, phases, ticks, step=7, phase="data", patience=patience)


def fault_after(looks: int, *ranks) -> str | None:
    """What a watch says once each rank's beat has been seen at `looks` looks; a rank: look number -> Beat."""
    watch = Watch(Path(), 10.0, World(0, len(ranks)), lambda: True)
    watch._names = [f"rank {r}" for r in range(len(ranks))]
    seen = {r: Seen(rank(0)) for r, rank in enumerate(ranks)}
    for look in range(1, looks):
        seen = {r: seen[r].then(rank(look)) for r, rank in enumerate(ranks)}
    return watch._fault(seen)


def waiting(look: int) -> Beat:
    return beat(look, 41)


def test_a_rank_that_is_stuck_behind_the_others_is_the_one_named():
    asleep = partial(beat, phases=40)
    assert fault_after(LOOKS, waiting, asleep, waiting) is None
    assert (
        fault_after(LOOKS + 1, waiting, asleep, waiting)
        == "no progress for 10 s on rank 1 (last seen at step 7, data)"
    )


def test_a_rank_whose_process_no_longer_runs_is_named_wherever_it_stopped():
    gone = [lambda look: beat(3, 40), lambda look: beat(3, 41), lambda look: beat(3, 42, patience=99)]
    for dead in gone:
        assert fault_after(LOOKS, waiting, dead) is None
        assert (
            fault_after(LOOKS + 1, waiting, dead)
            == "no answer for 10 s from rank 1 (last seen at step 7, data)"
        )


def test_nobody_is_suspected_while_the_rank_that_is_waited_for_moves():
    slow = [
        lambda look: beat(look, 40, ticks=look),  # is in a long phase, and shows that it moves
        lambda look: beat(look, 40, ticks=look // (LOOKS - 1)),  # just often enough
        lambda look: beat(look, 40, patience=99),  # is in a phase that is known to take long
    ]
    for behind in slow:
        assert fault_after(10 * LOOKS, waiting, behind) is None


def test_where_no_rank_is_behind_all_are_named():
    assert fault_after(LOOKS + 1, waiting, waiting) == (
        "no progress for 10 s on rank 0 (last seen at step 7, data), rank 1 (last seen at step 7, data)"
    )


def watch_of(folder: Path, world: World, *hosts: str) -> Watch:
    watch = Watch(folder, 10.0, world, lambda: True)
    watch._meet([(f"rank {rank}", host) for rank, host in enumerate(hosts)])
    return watch


def test_a_rank_that_left_in_peace_is_not_missed(tmp_path):
    world = World(0, 2)
    watch, other = (watch_of(tmp_path, w, "here", "here") for w in (world, World(1, 2)))
    watch._write()
    assert sorted(watch._look({})) == [0]  # the other one is still to come
    other._write()
    seen = watch._look({})
    assert sorted(seen) == [0, 1]
    other._put(LEFT)
    assert sorted(watch._look(seen)) == [0]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (LookupError("a bug"), "an error has ended rank 1 (last seen at step 7, data)"),
        (UserError("all know"), None),
    ],
)
def test_a_rank_that_an_error_has_ended_is_not_waited_for(tmp_path, monkeypatch, error, told):
    monkeypatch.setattr(World, "gather", lambda self, item, group=None: [item] * self.size)
    watch, other = (watch_of(tmp_path, World(rank, 2), "here", "here") for rank in (0, 1))
    watch._write()
    other.__enter__()
    other.enter("data", step=7)
    other.__exit__(type(error), error, None)
    assert watch._fault(watch._look({})) == told


def test_a_look_opens_one_file_for_each_node_and_sees_every_rank(tmp_path, monkeypatch):
    """Ranks may be dealt out to the nodes in turn."""
    hosts = ("a", "b", "c") * 4
    watches = [watch_of(tmp_path, World(rank, 12), *hosts) for rank in range(12)]
    for watch in watches:
        watch.enter(f"phase of {watch.world.rank}", step=7)
        watch._write()
    opened, read = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: opened.append(path) or read(path))
    seen = watches[5]._look({})
    assert {rank: s.beat.phase for rank, s in seen.items()} == {r: f"phase of {r}" for r in range(12)}
    assert len(opened) == 3


def test_a_beat_is_rewritten_in_place(tmp_path):
    """So it needs no room on a disk that has become full."""
    watch = watch_of(tmp_path, World(), "here")
    watch._write()
    (path,) = tmp_path.iterdir()
    inode, size = path.stat().st_ino, path.stat().st_size
    watch.enter("a phase with a rather long name, as phases go", step=10**9, patience=12.0)
    watch._write()
    assert (path.stat().st_ino, path.stat().st_size) == (inode, size)
