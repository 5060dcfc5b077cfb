from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch

from ldct_dist.checkpoint import generation, retention
from ldct_dist.checkpoint.load import newest_valid, read, verify_run, weights_of
from ldct_dist.checkpoint.manifest import Corrupt, Manifest
from ldct_dist.checkpoint.pieces import Part
from ldct_dist.checkpoint.retention import CheckpointConfig
from ldct_dist.checkpoint.save import Saver, share_out
from ldct_dist.errors import UserError
from ldct_dist.files import TEMPORARY
from ldct_dist.world import World

ALONE = World()


def parts(value: float) -> dict[str, Part]:
    return {
        "weights.safetensors": Part(
            {"w": torch.full((40, 30), value), "b": torch.arange(7.0)}, {"kind": "test"}
        ),
        "optimizer.safetensors": Part(
            {"w/exp_avg": torch.full((40, 30), -value), "w/step": torch.tensor(value)}
        ),
    }


@pytest.fixture
def saver(tmp_path):
    number = generation.claim(tmp_path / "generations")
    config = CheckpointConfig(keep_last=2, keep_every=50)
    return Saver(tmp_path / "checkpoints", tmp_path / "generations", number, config, ALONE)


def save(saver: Saver, step: int, validation: float | None = None, **facts):
    saver.save(step, parts(step), {"step": step, "validation": validation, **facts})
    return saver.finish()


def steps(saver: Saver) -> list[int]:
    return sorted(int(p.name.removeprefix("step-")) for p in saver.root.iterdir())


def test_what_was_saved_is_read_back_bit_for_bit(saver):
    outcome = save(saver, 3)
    found = newest_valid(saver.root, ALONE)
    assert found.path == outcome.path
    assert found.passed_over == []
    got = {(file, name): tensor for file, name, tensor in read(found.path, found.manifest, ALONE)}
    for file, part in parts(3).items():
        for name, tensor in part.tensors.items():
            assert torch.equal(got.pop((file, name)), tensor)
    assert not got


def test_training_may_change_tensors_once_they_are_staged(saver):
    live = torch.zeros(1000)
    saver.save(1, {"weights.safetensors": Part({"w": live})}, {"validation": None})
    saver.staged()
    live.fill_(7)
    saver.finish()
    found = newest_valid(saver.root, ALONE)
    assert all((t == 0).all() for _, _, t in read(found.path, found.manifest, ALONE))


def test_any_changed_byte_or_cut_is_found_and_the_one_before_is_taken(saver, tmp_path):
    save(saver, 1)
    good = save(saver, 2).path
    draw = random.Random(0)
    files = sorted(good.iterdir())
    assert len(files) == 3
    for trial in range(120):
        backup = tmp_path / "backup"
        shutil.copytree(good, backup)
        victim = good / files[trial % 3].name
        raw = bytearray(victim.read_bytes())
        place = draw.randrange(len(raw))
        if trial % 4 == 3:
            raw = raw[:place]
        else:
            raw[place] ^= 1 << draw.randrange(8)
        victim.write_bytes(raw)
        found = newest_valid(saver.root, ALONE)
        assert found.path.name == "step-00000001", (victim.name, place)
        assert len(found.passed_over) == 1
        assert "step-00000002" in found.passed_over[0]
        assert len(verify_run(saver.root)) == 1
        shutil.rmtree(good)
        backup.rename(good)
    assert verify_run(saver.root) == []


def test_a_missing_file_and_a_missing_manifest_are_passed_over(saver):
    save(saver, 1)
    path = save(saver, 2).path
    (path / "optimizer.safetensors").unlink()
    assert "optimizer.safetensors is not readable" in newest_valid(saver.root, ALONE).passed_over[0]
    (path / "MANIFEST.json").unlink()
    with pytest.raises(Corrupt, match=r"MANIFEST.json is not readable"):
        Manifest.read(path)
    assert newest_valid(saver.root, ALONE).path.name == "step-00000001"


def test_the_newest_the_best_and_every_nth_stay(saver):
    for step, score in ((10, 9.0), (20, 3.0), (30, 8.0), (50, None), (60, 7.0), (70, None), (80, 5.0)):
        save(saver, step, score)
    assert steps(saver) == [20, 50, 70, 80]
    assert weights_of(saver.root.parent).parent.name == "step-00000020"


def test_stops_do_not_push_out_what_a_run_goes_back_to(saver):
    saver.config = CheckpointConfig(every=10, keep_last=3)
    within = {"guard": {"stretch": ["a step that was skipped"]}}
    for step in (10, 11, 12, 13):
        save(saver, step)
    assert steps(saver) == [10, 12, 13]
    save(saver, 20, **within)
    assert steps(saver) == [10, 13, 20]
    for step in (30, 31, 32):
        save(saver, step)
    assert steps(saver) == [30, 31, 32]
    saver.config = CheckpointConfig(every=10, keep_last=1)
    save(saver, 33)
    assert steps(saver) == [33]


@pytest.mark.parametrize(("keep_last", "keep_every"), [(0, None), (1, None), (3, None), (1, 40)])
def test_as_many_checkpoints_as_a_config_says_are_there_at_a_time(saver, monkeypatch, keep_last, keep_every):
    """Before a save makes room for itself, and with the best long ago."""
    saver.config = CheckpointConfig(every=10, keep_last=keep_last, keep_every=keep_every)
    prune, most = retention.prune, []

    def counting(root, config):
        most.append(len(steps(saver)))
        prune(root, config)

    monkeypatch.setattr(retention, "prune", counting)
    for step in range(10, 100, 10):
        save(saver, step, validation=float(step))
        assert max(most) <= saver.config.at_most(step)
    assert max(most[:7]) == saver.config.at_most(70)  # one less where the newest is one of keep_every's


def test_a_copy_that_a_user_keeps_beside_checkpoints_is_none(saver):
    kept = save(saver, 10).path.rename(saver.root / "step-00000010-good")
    for step in (20, 30, 40):
        save(saver, step)
    assert kept.exists()
    (kept / "MANIFEST.json").unlink()
    assert newest_valid(saver.root, ALONE).passed_over == []


def test_the_best_is_of_those_measured_on_what_the_newest_was(saver):
    """An RMSE of other cases says nothing, nor does one of a version that did not say of which it was."""
    few, all_cases = ({"basis": {"split": "val", "cases": n}} for n in (2, 9))

    def best() -> str:
        return weights_of(saver.root.parent).parent.name

    save(saver, 10, 1.0)
    save(saver, 20, 2.0)
    assert best() == "step-00000010"
    save(saver, 30, 8.0, **few)
    assert best() == "step-00000030"
    for step, score in ((40, 14.0), (60, 12.0), (70, None), (80, None)):
        save(saver, step, score, **all_cases)
    assert best() == "step-00000060"
    assert steps(saver) == [60, 70, 80]


def test_a_newer_generation_fences_the_older_one_and_outranks_its_steps(saver, tmp_path):
    save(saver, 100)
    newer = Saver(saver.root, saver.claims, generation.claim(saver.claims), saver.config, ALONE)
    assert save(newer, 40).error is None
    outcome = save(saver, 120)
    assert outcome.fenced
    assert outcome.path is None
    assert "taken over by generation 2" in outcome.error
    assert newest_valid(saver.root, ALONE).path.name == "step-00000040"


def test_two_claims_never_get_the_same_generation(tmp_path):
    assert [generation.claim(tmp_path) for _ in range(5)] == [1, 2, 3, 4, 5]


def test_leftovers_of_a_killed_save_do_not_block_the_next(saver):
    saver.root.mkdir()
    (saver.root / f"{TEMPORARY}step-00000005-000001").mkdir()
    (saver.root / f"{retention.DISCARDED}step-00000001").mkdir()
    assert save(saver, 5).error is None
    assert steps(saver) == [5]


def test_a_step_saved_again_replaces_the_checkpoint_that_was_passed_over(saver):
    path = save(saver, 5).path
    (path / "weights.safetensors").write_bytes(b"")
    assert save(saver, 5).error is None
    assert verify_run(saver.root) == []


class Killed(BaseException):
    """This process ends here."""


@pytest.mark.parametrize("ends", [Killed, OSError])
def test_a_step_saved_again_is_there_whatever_comes_between_its_renames(saver, monkeypatch, ends):
    save(saver, 5)
    rename = Path.rename

    def ended_before_the_second(self, target):
        if self.name.startswith(TEMPORARY):
            raise ends
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", ended_before_the_second)
    saver.save(5, parts(6), {"step": 5, "validation": None})
    if ends is Killed:
        with pytest.raises(Killed):
            saver.finish()
    else:
        assert saver.finish().error is not None
    monkeypatch.undo()
    retention.complete(saver.root)  # as a start does
    found = newest_valid(saver.root, ALONE)
    assert found.manifest.step == 5
    (weight,) = (t for _, name, t in read(found.path, found.manifest, ALONE) if name == "w")
    assert weight[0, 0] == (6 if ends is Killed else 5)


def test_a_save_killed_before_its_manifest_is_not_taken_for_one(saver):
    save(saver, 5)
    half = saver.root / f"{TEMPORARY}step-00000006-000001"
    half.mkdir()
    (half / "weights.safetensors").write_bytes(b"half")
    retention.complete(saver.root)
    assert newest_valid(saver.root, ALONE).manifest.step == 5
    assert half.exists()


def test_what_cannot_be_deleted_costs_a_warning_and_no_checkpoint(saver, monkeypatch):
    for step in (1, 2):
        save(saver, step)

    def refused(path):
        raise PermissionError(1, "Operation not permitted", str(path))

    monkeypatch.setattr(retention, "discard", refused)
    outcome = save(saver, 3)
    assert (outcome.path.name, outcome.error) == ("step-00000003", None)
    assert "could not be deleted" in outcome.warning
    assert newest_valid(saver.root, ALONE).path == outcome.path


def test_a_save_that_cannot_be_written_is_an_outcome_and_leaves_the_last_good_one(saver, monkeypatch):
    save(saver, 1)
    monkeypatch.setattr("ldct_dist.checkpoint.pieces.os.fsync", _disk_full)
    outcome = save(saver, 2)
    assert "No space left on device" in outcome.error
    assert [p.name for p in saver.root.iterdir()] == ["step-00000001"]
    monkeypatch.undo()
    assert save(saver, 3).error is None


def _disk_full(*_, **__):
    raise OSError(28, "No space left on device")


def test_what_many_ranks_or_files_tell_is_one_line_of_a_few(saver, monkeypatch):
    path = save(saver, 1).path
    manifest = Manifest.read(path)
    many = {f"optimizer-{i:03d}": (1, "") for i in range(500)}
    Manifest(manifest.generation, 1, many, manifest.state).write(path)
    (line,) = newest_valid(saver.root, ALONE).passed_over
    assert line.startswith("step-00000001: optimizer-000 is not readable")
    assert line.endswith("; and 496 more")
    monkeypatch.setattr("ldct_dist.checkpoint.pieces.write", _disk_full)
    monkeypatch.setattr(World, "gather", lambda self, item, group=None: [item] * 500)
    error = save(saver, 2).error
    assert error.count("No space left on device") == 4
    assert error.endswith("; and 496 more")


def test_writes_are_spread_over_ranks():
    sizes = {"a": 100, "b": 60, "c": 40, "d": 30, "e": 30}
    given = {name: Part({"t": torch.zeros(n)}) for name, n in sizes.items()}
    owner = share_out(given, 2)
    loads = [sum(sizes[name] for name, rank in owner.items() if rank == r) for r in (0, 1)]
    assert sorted(loads) == [130, 130]


def test_weights_of_a_folder_without_any_is_one_line(tmp_path):
    with pytest.raises(UserError, match="not a weights file, a checkpoint, or a run"):
        weights_of(tmp_path)
