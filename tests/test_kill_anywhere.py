from __future__ import annotations

import random

import pytest

from forked import fork
from killer import IN_A_SAVE, KilledRun, leftovers
from runs import same, write_config
from stores import make_store


@pytest.mark.filterwarnings("ignore:.*forkserver.*")
def test_killed_in_a_step_and_in_every_phase_of_a_save_it_ends_as_the_unbroken_run(tmp_path):
    store = make_store(tmp_path / "store", [(16, 40, 40)] * 3, ["train", "train", "val"]).path
    longer = {"steps": 16, "checkpoint": {"every": 2}}
    for name in ("unbroken", "killed"):
        (tmp_path / name).mkdir()
    unbroken = write_config(tmp_path / "unbroken", store, **longer)
    assert fork(unbroken) == [0, 0]
    config = write_config(tmp_path / "killed", store, **longer)
    killed, draw = KilledRun(config, tmp_path / "killed/runs/run"), random.Random(0)
    met = [killed.strike(target, draw) for target in ("write", "rename", "renamed", "train", "commit")]
    assert None not in met, config.with_suffix(".log").read_text()
    assert sum(phase in IN_A_SAVE for phase in met) >= 3
    assert killed.finish() == [0, 0]
    assert killed.lost == 0
    assert leftovers(killed.run) == []
    assert same(killed.run, tmp_path / "unbroken/runs/run")
