from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch

from killer import IN_A_SAVE, KilledRun, leftovers
from stores import make_store

sys.path.append(str(Path(__file__).parent / "train"))
from forked import fork
from runs import CONFIG, final_state, losses, write_config


@pytest.mark.filterwarnings("ignore:.*forkserver.*")
def test_killed_in_a_step_and_in_every_phase_of_a_save_it_ends_as_the_unbroken_run(tmp_path):
    store = make_store(tmp_path / "store", [(16, 40, 40)] * 3, ["train", "train", "val"]).path
    text = CONFIG.replace("steps: 8", "steps: 16").replace("every: 3", "every: 2")
    for name in ("unbroken", "killed"):
        (tmp_path / name).mkdir()
    unbroken = write_config(tmp_path / "unbroken", store, text)
    assert fork(unbroken) == [0, 0]
    config = write_config(tmp_path / "killed", store, text)
    killed, draw = KilledRun(config, tmp_path / "killed/runs/run"), random.Random(0)
    met = [killed.strike(target, draw) for target in ("write", "rename", "renamed", "train", "commit")]
    assert None not in met, config.with_suffix(".log").read_text()
    assert sum(phase in IN_A_SAVE for phase in met) >= 3
    assert killed.finish() == [0, 0]
    assert killed.lost == 0
    assert leftovers(killed.run) == []
    reference = tmp_path / "unbroken/runs/run"
    assert losses(killed.run) == losses(reference)
    after, before = final_state(killed.run), final_state(reference)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], before[k]) for k in before)
