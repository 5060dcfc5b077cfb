from __future__ import annotations

import ctypes
import os
import resource
import signal
from functools import partial
from pathlib import Path

import pytest

from forked import fork
from ldct_dist.checkpoint.load import newest_valid, verify_run
from ldct_dist.checkpoint.save import Saver
from ldct_dist.data.loader import Loader
from ldct_dist.errors import UserError
from ldct_dist.world import World
from runs import losses, same, write_config
from stores import make_store

NEWNS, MS_RDONLY, MS_REMOUNT, MS_BIND, MS_PRIVATE = 0x20000, 1, 32, 4096, 1 << 18 | 16384


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    shapes = [(16, 40, 40)] * 3
    return make_store(tmp_path_factory.mktemp("disks") / "ct.zarr", shapes, ["train", "train", "val"]).path


@pytest.fixture(scope="module")
def unbroken(store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    assert fork(write_config(folder, store)) == [0, 0]
    return folder / "runs" / "run"


def after_the_first_save(spoil, first: int = 3) -> None:
    """In a training process: `spoil` the disk when the save after that of step `first` begins."""
    save = Saver.save

    def spoilt(self, step, parts, state):
        if step > first:
            spoil()
        save(self, step, parts, state)

    Saver.save = spoilt


def full(rank: int) -> None:
    """A disk that takes no more than 100 kB a file: enough for losses, too little for weights."""
    after_the_first_save(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))


def full_before_the_stop(first: int, rank: int) -> None:
    """The same, and the run is asked to stop, as at a time limit."""

    def spoil() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        os.kill(os.getpid(), signal.SIGUSR1)

    after_the_first_save(spoil, first)


def read_only(run: Path, rank: int) -> None:
    """The run's folder becomes read-only to this process, as on a file system remounted after an error."""
    after_the_first_save(partial(make_read_only, run))


def make_read_only(folder: Path) -> None:
    if os.geteuid() != 0:
        chmod(folder, 0o555)
        return
    libc, place = ctypes.CDLL(None, use_errno=True), os.fsencode(folder)
    steps = (
        lambda: libc.unshare(NEWNS),
        lambda: libc.mount(b"none", b"/", None, MS_PRIVATE, None),
        lambda: libc.mount(place, place, None, MS_BIND, None),
        lambda: libc.mount(b"none", place, None, MS_BIND | MS_REMOUNT | MS_RDONLY, None),
    )
    for step in steps:
        if step() != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def chmod(run: Path, mode: int) -> None:
    for name in ("checkpoints", "generations"):
        (run / name).chmod(mode)


def goes_on_once_the_disk_is_well(config: Path, run: Path, unbroken: Path) -> None:
    assert fork(config) == [0, 0]
    assert f"resumed at step 3 from {run}" in config.with_suffix(".log").read_text()
    assert same(run, unbroken)


def test_on_a_full_disk_training_ends_in_one_line_and_the_last_good_checkpoint_stays(
    store, tmp_path, unbroken
):
    config, run = write_config(tmp_path, store), tmp_path / "runs" / "run"
    assert fork(config, plant=full) == [2, 2]
    said = config.with_suffix(".log").read_text()
    assert "Traceback" not in said
    assert "warning: a checkpoint was not written" in said
    assert said.count("error: the last checkpoint of") == 1
    assert "training goes on, and the last good one is kept" in said
    assert newest_valid(run / "checkpoints", World()).manifest.step == 3
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000003"]
    assert verify_run(run / "checkpoints") == []
    goes_on_once_the_disk_is_well(config, run, unbroken)


def test_a_start_that_could_save_nothing_does_not_ask_for_another(store, tmp_path, unbroken):
    """A job that is told to go on, and gets no further, would be requeued for ever."""
    config, run = write_config(tmp_path, store), tmp_path / "runs" / "run"
    assert fork(config, plant=partial(full_before_the_stop, 3)) == [
        75,
        75,
    ]  # step 3 was saved: that is worth another start
    assert newest_valid(run / "checkpoints", World()).manifest.step == 3
    assert fork(config, plant=partial(full_before_the_stop, 0)) == [2, 2]
    said = config.with_suffix(".log").read_text()
    assert said.count("which was not saved") == 2
    assert said.count("error: the last checkpoint of") == 1
    assert "Traceback" not in said
    goes_on_once_the_disk_is_well(config, run, unbroken)


def damaged_data(rank: int) -> None:
    full(rank)
    batch = Loader.batch

    def damaged(self, step):
        if step == 4:
            raise UserError("case-000 is damaged")
        return batch(self, step)

    Loader.batch = damaged


def test_where_damaged_data_ends_a_run_and_the_disk_is_full_both_are_said(store, tmp_path):
    config = write_config(tmp_path, store)
    assert fork(config, plant=damaged_data) == [2, 2]
    said = config.with_suffix(".log").read_text()
    assert "error: case-000 is damaged" in said
    assert "step 4 was not saved: " in said


def test_in_a_folder_that_became_read_only_nothing_is_lost(store, tmp_path, unbroken):
    config, run = write_config(tmp_path, store), tmp_path / "runs" / "run"
    codes = fork(config, plant=partial(read_only, run))
    said = config.with_suffix(".log").read_text()
    if "Operation not permitted" in said:
        pytest.skip("root without the right to mount: no folder is read-only to it")
    assert codes == [2, 2]
    assert "Traceback" not in said
    assert "Read-only file system" in said or "Permission denied" in said
    assert said.count("error: the last checkpoint of") == 1
    if os.geteuid() != 0:
        chmod(run, 0o755)
    assert newest_valid(run / "checkpoints", World()).manifest.step == 3
    goes_on_once_the_disk_is_well(config, run, unbroken)


def read_only_from_the_start(run: Path, rank: int) -> None:
    make_read_only(run)


def read_only_before_the_stop(run: Path, rank: int) -> None:
    def spoil() -> None:
        make_read_only(run)
        os.kill(os.getpid(), signal.SIGUSR1)

    after_the_first_save(spoil)


@pytest.mark.parametrize(
    ("before", "plant", "codes"),
    [(3, read_only_from_the_start, [2, 2]), (8, read_only_before_the_stop, [75, 75])],
)
def test_a_folder_that_is_read_only_costs_no_traceback(store, tmp_path, before, plant, codes):
    """One that was so at the start is a mistake to mend, one that became so leaves a run to go on with."""
    config, run = write_config(tmp_path, store, steps=before), tmp_path / "runs" / "run"
    if plant is read_only_from_the_start:
        assert fork(config) == [0, 0]
    log = config.with_suffix(".log")
    known = log.read_text() if log.exists() else ""
    ended = fork(config, plant=partial(plant, run))
    said = log.read_text().removeprefix(known)
    if "Operation not permitted" in said:
        pytest.skip("root without the right to mount: no folder is read-only to it")
    if os.geteuid() != 0:
        chmod(run, 0o755)
    assert ended == codes
    assert "Traceback" not in said
    assert said.count("error: ") == codes.count(2) / 2
    assert "Read-only file system" in said or "Permission denied" in said


def test_without_a_valid_checkpoint_a_start_neither_trains_from_scratch_nor_deletes_any(store, tmp_path):
    """They may be away for a while only, as where one of a file system's servers is."""
    config, run = write_config(tmp_path, store), tmp_path / "runs" / "run"
    assert fork(config) == [0, 0]
    files = sorted((run / "checkpoints").rglob("weights-raw.safetensors"))
    for file in files:
        file.rename(file.with_name("away"))
    assert fork(config) == [2, 2]
    said = config.with_suffix(".log").read_text()
    assert said.count("passed over checkpoint") == len(files) > 1
    assert said.count("error: ") == 1
    assert f"error: no checkpoint in {run / 'checkpoints'} is valid" in said
    assert len(losses(run)) == 8
    for file in files:
        file.with_name("away").rename(file)
    assert fork(config) == [0, 0]
    assert "resumed at step 8" in config.with_suffix(".log").read_text()
