"""State on a disk of the node."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from ldct_dist.errors import UserError
from ldct_dist.train.config import RunConfig
from ldct_dist.train.strategy.disk import Disk, lies_in_memory
from ldct_dist.train.strategy.engine import refuse_deepspeed
from ldct_dist.world import World


def test_a_disk_without_room_is_refused_with_what_it_takes_and_is_not_filled(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: pytest.fail("all that is free was taken"))
    with pytest.raises(UserError, match=r"each rank there takes 1,024.0 TiB: make room"):
        Disk(tmp_path, 2**50)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not lies_in_memory(Path("/dev/shm")), reason="no tmpfs at /dev/shm")
def test_a_disk_that_is_memory_is_told_of(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "deepspeed", None)  # what comes next would compile
    places = {"optimizer": "nvme", "nvme_path": "/dev/shm"}
    config = {"name": "x", "store": "x", "steps": 1, "strategy": "deepspeed", "zero": 3, "deepspeed": places}
    with pytest.raises(UserError, match="DeepSpeed is missing"):
        refuse_deepspeed(RunConfig.model_validate(config), World())
    assert "nvme_path=/dev/shm" in (told := capsys.readouterr().out)
    assert "is a tmpfs" in told
    assert not lies_in_memory(Path("/proc"))
