"""What is written of a run, and taken back."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ldct_dist.ct.volume import Volume
from ldct_dist.train.config import RunConfig, ValidationConfig
from ldct_dist.train.monitor import Monitor, StepFigures
from ldct_dist.train.run import RunFolder
from ldct_dist.train.validation import Validated
from ldct_dist.world import World
from runs import board, losses

CONFIG = RunConfig.model_validate({"name": "run", "store": "ct.zarr", "steps": 8})


ZEROED = b'{"step": 3, "lo' + bytes(64) + b'm": 0.5}'  # of two lines, by a power cut


@pytest.mark.parametrize("damage", [b"\xff", b'{"stop": 3}', b"7", b'{"step": 6, "lo', ZEROED])
def test_losses_of_later_steps_are_taken_back_and_a_damaged_line_costs_no_other(tmp_path, damage):
    folder = RunFolder(tmp_path)
    lines = [json.dumps({"step": step}).encode() for step in range(1, 8)]
    lines[2] = damage
    folder.losses.write_bytes(b"\n".join(lines) + b"\n")
    with Monitor(folder, CONFIG, World()) as monitor:
        monitor.rewind(5)
    assert [line["step"] for line in losses(folder.path)] == [1, 2, 4, 5]


def test_taking_lines_back_takes_no_more_memory_however_many_there_are(tmp_path):
    folder = RunFolder(tmp_path)
    line = {"loss": 9.75, "lr": 1e-3, "grad_norm": 0.5, "applied": True}
    folder.losses.write_text("".join(json.dumps({"step": step} | line) + "\n" for step in range(1, 20001)))
    with Monitor(folder, CONFIG, World()) as monitor:
        tracemalloc.start()
        monitor.rewind(19990)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert len(losses(folder.path)) == 19990
    assert peak < folder.losses.stat().st_size / 4


def test_a_validation_says_how_many_cases_took_how_long_and_names_few_of_them(tmp_path, capsys):
    failed = [f"case-{i:03d}" for i in range(1000)]
    with Monitor(RunFolder(tmp_path), CONFIG, World()) as monitor:
        monitor.rewind(0)
        monitor.validation(4, Validated({}, failed, None, {"cases": 1047}, 1234.5))
    line = capsys.readouterr().out
    assert "case-000, " in line
    assert len(line) < 250
    assert line.endswith("[abdomen]   cases 1047 in 0:20:34\n")


def test_loss_and_validation_come_first_in_tensorboard(tmp_path):
    """It sorts by name, and its Scalars tab opens the first two groups alone."""
    with Monitor(RunFolder(tmp_path), CONFIG, World()) as monitor:
        monitor.rewind(0)
        monitor.step(StepFigures(8, 9.75, 1e-3, 0.5, applied=True, wait_s=0.1, seconds=1.0))
        monitor.validation(8, Validated({"rmse_hu": 9.0}, [], None, {"cases": 1}, 1.0))
    groups = {tag.partition("/")[0] for tag in board(tmp_path).Tags()["scalars"]}
    assert sorted(groups)[:2] == ["train", "validation"]


def test_however_many_validations_there_are_some_fifty_have_a_picture(tmp_path):
    config = CONFIG.model_copy(update={"steps": 200, "validation": ValidationConfig(every=1)})
    case = Volume(np.arange(4096, dtype=np.int16).reshape(4, 32, 32), (3.0, 1.0, 1.0))
    done = Validated({}, [], {"low dose": case, "full dose": case}, {"cases": 1}, 1.0)
    with Monitor(RunFolder(tmp_path), config, World()) as monitor:
        monitor.rewind(0)
        for step in range(1, 201):
            monitor.validation(step, done)
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0}).Reload()
    (tag,) = events.Tags()["images"]
    shown = [image.step for image in events.Images(tag)]
    assert (shown[0], shown[-1]) == (1, 200)
    assert 40 < len(shown) < 60


def test_where_tensorboard_has_no_room_to_begin_nothing_else_is_said(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(122, "Disk quota exceeded")

    monkeypatch.setattr("ldct_dist.train.monitor.Board", full)
    with (
        pytest.raises(OSError, match="Disk quota exceeded"),
        Monitor(RunFolder(tmp_path), CONFIG, World()) as m,
    ):
        m.rewind(0)
