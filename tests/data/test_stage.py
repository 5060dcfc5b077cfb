from __future__ import annotations

import errno
import fcntl
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch

from ldct_dist.ct.volume import Volume
from ldct_dist.data import stage
from ldct_dist.data.loader import Loader
from ldct_dist.data.plan import DataConfig, Plan
from ldct_dist.data.stage import Copier, StagedStore
from ldct_dist.errors import UserError
from ldct_dist.store import layout
from ldct_dist.store.reader import Store
from ldct_dist.world import World
from stores import SPACING, make_store

RANDOM = random.Random(0)
SHAPES = [(20, 40, 40), (33, 40, 50), (9, 64, 64)]
EVERY_ARRAY = [(f"case-{i:03d}", dose) for i in range(3) for dose in ("1.00", "0.25")]


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Cases of many small chunks, and of several shards."""
    monkeypatch.setattr(layout, "CHUNK", (16, 16, 24))
    monkeypatch.setattr(layout, "SHARD_CAP", 1)  # one layer of chunks a shard
    return make_store(tmp_path / "ct.zarr", SHAPES).path


def copied(store, disk, arrays=EVERY_ARRAY):
    """A store whose `arrays` have been copied as far as they can be, and what was said about it."""
    lines: list[str] = []
    staged = StagedStore(store, str(disk), lines.append)
    Copier(staged, staged.copies, lines.append).copy(arrays)
    return staged, lines


def batches(store, steps=range(6)):
    config = DataConfig(crop=(16, 24, 24), batch=4, reuse=1.0)
    with Loader(Plan(store, config, seed=5)) as loader:
        return [loader.batch(step).low.clone() for step in steps]


def wait_until(ready):
    deadline = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def same(some, others):
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def test_what_is_copied_is_read_without_the_store_and_is_the_same(store, tmp_path):
    expected = batches(Store(store))
    staged, (line,) = copied(store, tmp_path)
    assert "6 arrays" in line
    for shard in store.rglob("c"):
        shutil.rmtree(shard)
    assert same(batches(staged), expected)
    again, (line,) = copied(store, tmp_path)  # another run on this node
    assert "0 arrays" in line
    assert same(batches(again), expected)


def test_until_a_copy_is_there_the_store_is_read(store, tmp_path):
    expected = batches(Store(store))
    staged, _ = copied(store, tmp_path, EVERY_ARRAY[:2])
    for _, dose in EVERY_ARRAY[:2]:
        shutil.rmtree(store / "cases" / "case-000" / dose / "c")
    assert same(batches(staged), expected)


def test_a_run_copies_what_it_will_read_beside_its_work_and_no_more(store, tmp_path):
    staged = StagedStore(store, str(tmp_path), print)
    plan = Plan(staged, DataConfig(crop=(16, 24, 24), batch=1, reuse=1.0), seed=5)
    wanted = {crop.block.case for step in range(2) for crop in plan.crops(step)}
    assert len(wanted) < len(SHAPES)
    with staged.staging(plan, World(), range(2), held_out=[]):
        wait_until(lambda: len(list(staged.copies.glob("cases/*/?.??"))) == 2 * len(wanted))
    assert {p.name for p in (staged.copies / "cases").iterdir()} == wanted


@pytest.mark.parametrize("file", ["c/0/0/0", "zarr.json"])
@pytest.mark.parametrize("harm", ["flip", "truncate", "delete"])
def test_a_damaged_copy_is_not_read_is_said_and_is_made_anew(store, tmp_path, file, harm):
    whole = tuple(slice(0, n) for n in SHAPES[0])
    expected = Store(store).read("case-000", "0.25", whole)
    staged, lines = copied(store, tmp_path)
    copy = staged.copies / "cases/case-000/0.25"
    raw = bytearray((copy / file).read_bytes())
    raw[:1] = b"\xff"
    if harm == "delete":
        (copy / file).unlink()
    else:
        (copy / file).write_bytes(raw if harm == "flip" else raw[: len(raw) // 2])
    for _ in range(2):
        assert np.array_equal(staged.read("case-000", "0.25", whole), expected)
    assert len(lines) == 2
    assert f"{copy} is damaged" in lines[1]
    assert not copy.exists()
    assert "1 arrays" in copied(store, tmp_path)[1][0]


def test_a_store_whose_path_is_not_in_utf_8_is_copied_too(store, tmp_path):
    named = store.rename(store.with_name(os.fsdecode(b"ct-\xe9.zarr")))  # as an archive from elsewhere has it
    _, (line,) = copied(named, tmp_path)
    assert "6 arrays" in line


def test_copies_of_another_store_are_not_read(store, tmp_path):
    copied(store, tmp_path)
    other = make_store(tmp_path / "other.zarr", SHAPES, noise=50.0).path
    staged = StagedStore(other, str(tmp_path))
    assert same(batches(staged), batches(Store(other)))
    assert not same(batches(staged), batches(Store(store)))


def test_a_case_that_was_put_into_anothers_place_is_not_copied(store, tmp_path):
    staged = StagedStore(store, str(tmp_path))
    volume = Volume(np.zeros(SHAPES[0], np.int16), SPACING)
    layout.write_case(store, "case-000", {1.0: volume, 0.25: volume}, patient="p", split="train")
    lines: list[str] = []
    Copier(staged, staged.copies, lines.append).copy(EVERY_ARRAY)
    assert "case case-000 was ingested again" in lines[0]
    assert not list(staged.copies.glob("cases/*/?.??"))


def test_a_damaged_array_of_the_store_is_not_copied_and_is_named_when_it_is_read(store, tmp_path):
    shard = store / "cases/case-000/1.00/c/0/0/0"
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 1
    shard.write_bytes(raw)
    staged, (line,) = copied(store, tmp_path)
    assert "checksum of chunk" in line
    with pytest.raises(UserError, match=r"ct\.zarr: case case-000 at dose 1\.00 is damaged"):
        batches(staged)


@pytest.mark.parametrize(
    ("disk", "reason"),
    [
        ("/no/such/disk", "No such file"),
        ("$NO_SUCH_VARIABLE", "No such file"),
        ("/proc", ""),
        (f"/tmp/{'x' * 300}", "File name too long"),
    ],
)
def test_a_disk_that_is_absent_or_cannot_be_written_costs_one_line(store, disk, reason):
    staged, lines = copied(store, disk)
    assert len(lines) == 1
    assert reason in lines[0]
    assert f"the rest is read from {store}" in lines[0]
    assert same(batches(staged), batches(Store(store)))


@pytest.mark.parametrize("by", ["folder", "link"])
def test_a_folder_that_another_user_has_laid_there_is_neither_written_to_nor_read(
    store, tmp_path, monkeypatch, by
):
    """As in a /tmp for all: its name holds the fingerprint, which reports tell, so others can be there first."""
    staged, _ = copied(make_store(tmp_path / "forged" / "ct.zarr", SHAPES, noise=90.0).path, tmp_path)
    theirs = staged.copies.rename(tmp_path / "theirs")
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (theirs / "store").unlink()
    (theirs / "store").symlink_to(victim)
    lines: list[str] = []
    staged = StagedStore(store, str(tmp_path), lines.append)
    if by == "link":
        staged.copies.symlink_to(theirs)
    else:
        theirs.rename(staged.copies)
        monkeypatch.setattr(os, "getuid", lambda: staged.copies.stat().st_uid + 1)

    Copier(staged, staged.copies, lines.append).copy(EVERY_ARRAY)

    (line,) = lines
    assert "a link, or another user's folder, is in its place" in line
    assert victim.read_text() == "precious"
    assert same(batches(staged), batches(Store(store)))


def test_what_a_copy_held_that_is_deleted_as_it_is_opened_is_read_from_the_store(
    store, tmp_path, monkeypatch
):
    staged, _ = copied(store, tmp_path)
    exists = os.path.exists

    def gone_after(path):
        there = exists(path)
        shutil.rmtree(staged.copies, ignore_errors=True)
        return there

    monkeypatch.setattr(os.path, "exists", gone_after)
    region = (slice(0, 9),) * 3
    assert np.array_equal(
        staged.read("case-000", "1.00", region), Store(store).read("case-000", "1.00", region)
    )


def test_the_stage_is_named_by_a_variable_of_the_node(store, tmp_path, monkeypatch):
    monkeypatch.setenv("SCRATCH_OF_THIS_NODE", str(tmp_path))
    staged, _ = copied(store, "$SCRATCH_OF_THIS_NODE")
    assert staged.copies.parent == tmp_path
    assert staged.copies.stat().st_mode & 0o077 == 0  # nobody else may look into it


@pytest.fixture
def small_disk(tmp_path, store):
    """A disk that holds less than the store: a tmpfs, or a limit on files where mounting is not allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    sizes = [p.stat().st_size for p in store.rglob("*") if p.is_file()]
    with ExitStack() as stack:
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", disk], check=False).returncode:
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            stack.callback(resource.setrlimit, resource.RLIMIT_FSIZE, (soft, hard))
            resource.setrlimit(resource.RLIMIT_FSIZE, (max(sizes) - 1, hard))
        else:
            stack.callback(subprocess.run, ["umount", "--lazy", disk], check=True)  # a store keeps files open
            assert sum(sizes) > 128 << 10
        yield disk


def test_a_disk_that_is_full_costs_one_line_and_what_found_room_is_used(store, small_disk):
    expected = batches(Store(store))
    staged, lines = copied(store, small_disk)
    there = {(p.parent.name, p.name) for p in (staged.copies / "cases").glob("*/?.??")}
    assert len(lines) == 1
    assert "No space left" in lines[0] or "File too large" in lines[0]
    assert 0 < len(there) < len(EVERY_ARRAY)
    assert not list(staged.copies.rglob(".writing-*"))  # half a copy would only take room
    for case, dose in there:
        shutil.rmtree(store / "cases" / case / dose / "c")
    assert same(batches(staged), expected)


def test_copies_of_what_the_store_was_before_are_deleted_unless_in_use(store, tmp_path):
    copied(make_store(tmp_path / "other.zarr", SHAPES, noise=9.0).path, tmp_path)
    (neighbour,) = tmp_path.glob("ldct_dist-*")
    before, _ = copied(store, tmp_path)
    shutil.rmtree(store)
    make_store(store, SHAPES, noise=50.0)
    said: list[str] = []
    with Copier(before, before.copies, said.append).at_work(EVERY_ARRAY):
        wait_until(lambda: said)
        expected = batches(before)
        _, lines = copied(store, tmp_path)
        assert len(lines) == 1
        assert same(batches(before), expected)  # a run from before the change goes on
    after, lines = copied(store, tmp_path)
    assert f"deleted {before.copies}, copies of an earlier state of {store}" in lines[0]
    assert set(tmp_path.glob("ldct_dist-*")) == {neighbour, after.copies}
    assert same(batches(after), batches(Store(store)))


def test_copying_goes_on_although_another_run_deletes_outdated_copies_at_the_same_time(
    store, tmp_path, monkeypatch
):
    before, _ = copied(store, tmp_path)
    shutil.rmtree(store)
    make_store(store, SHAPES, noise=50.0)
    read_bytes = Path.read_bytes

    def too_late(path, *given, **options):
        if path.parent == before.copies:
            shutil.rmtree(before.copies)
        return read_bytes(path, *given, **options)

    monkeypatch.setattr(Path, "read_bytes", too_late)
    after, lines = copied(store, tmp_path)
    assert list(tmp_path.glob("ldct_dist-*")) == [after.copies]
    (line,) = lines
    assert "is complete; copied 6 arrays" in line


COPY_ALL = """
import os, signal, sys, time
from pathlib import Path
from ldct_dist.data.stage import Copier, StagedStore

store, disk, doing = sys.argv[1], sys.argv[2], sys.argv[3]
copy_file, done = Copier._copy_file, []

def meet(self, source, target):
    copy_file(self, source, target)
    done.append((Path(disk) / f"met-{os.getpid()}").touch())
    while len(list(Path(disk).glob("met-*"))) < 2:  # both are in the middle of an array
        time.sleep(0.01)

def die(self, source, target):
    copy_file(self, source, target)
    done.append(target)
    if len(done) == 5:
        target.write_bytes(target.read_bytes()[:-100])
        os.kill(os.getpid(), signal.SIGKILL)

Copier._copy_file = {"meet": meet, "die": die}[doing]
staged = StagedStore(store, disk)
Copier(staged, staged.copies, print).copy([(c.name, d) for c in staged.cases for d in c.doses])
"""


def start(store: Path, disk: Path, doing: str) -> subprocess.Popen:
    arguments = [sys.executable, "-c", COPY_ALL, store, disk, doing]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)


def test_two_processes_copy_everything_once(store, tmp_path):
    both = [start(store, tmp_path, "meet") for _ in range(2)]
    lines = [process.communicate(timeout=60)[0] for process in both]
    made = [int(line.split(" arrays")[0].split()[-1]) for line in lines]
    assert min(made) > 0
    assert sum(made) == len(EVERY_ARRAY)
    staged = StagedStore(store, str(tmp_path))
    assert len(list(staged.copies.glob("cases/*/?.??"))) == len(EVERY_ARRAY)
    assert not list(staged.copies.rglob(".writing-*"))


def test_killed_in_the_middle_of_a_copy_the_next_one_goes_on(store, tmp_path):
    process = start(store, tmp_path, "die")
    assert process.wait(60) == -signal.SIGKILL
    process.stdout.close()
    (copies,) = tmp_path.glob("ldct_dist-*")
    assert list(copies.rglob(".writing-*"))
    expected = batches(Store(store))
    assert same(batches(StagedStore(store, str(tmp_path))), expected)  # what is half there is not read
    staged, lines = copied(store, tmp_path)
    assert len(lines) == 1
    assert not list(copies.rglob(".writing-*"))
    for shard in store.rglob("c"):
        shutil.rmtree(shard)
    assert same(batches(staged), expected)


def test_what_another_process_copies_is_left_to_it_and_looked_for_again(store, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "RETRY_S", 0.01)
    staged = StagedStore(store, str(tmp_path))
    target = staged.copies / "cases/case-000/1.00"
    target.with_name(".writing-1.00").mkdir(parents=True)
    with ExitStack() as another:
        assert another.enter_context(stage._lock(target.with_name(".writing-1.00")))
        with Copier(staged, staged.copies, print).at_work(EVERY_ARRAY[:1]):
            pass  # it leaves, although it is not done
        with Copier(staged, staged.copies, print).at_work(EVERY_ARRAY):
            wait_until(lambda: len(list(staged.copies.glob("cases/*/?.??"))) == len(EVERY_ARRAY) - 1)
            assert not target.exists()
            another.close()  # as if it had died
            wait_until(target.exists)
    assert not list(staged.copies.rglob(".writing-*"))


def test_a_disk_without_locks_keeps_no_file_open(tmp_path, monkeypatch):
    def no_locks(fd, mode):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match="No locks available"), stage._lock(tmp_path):
        pass
    assert os.listdir("/proc/self/fd") == before
