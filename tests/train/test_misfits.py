from __future__ import annotations

import pytest

from ldct_dist.models.registry import outline
from ldct_dist.train.config import RunConfig
from ldct_dist.train.misfits import note_on_margin
from stores import make_store


@pytest.mark.parametrize(("slices", "margin", "share"), [(33, (10, 0, 0), 38), (30, (0, 0, 0), 100)])
def test_what_the_loss_leaves_out_is_told_of_the_volumes_that_there_are(tmp_path, slices, margin, share):
    store = make_store(tmp_path / "ct.zarr", [(30, 24, 24), (slices, 24, 24)])
    config = RunConfig(name="run", store=store.path, steps=1, data={"crop": (32, 24, 24)})
    note = note_on_margin(config, outline(config.model), store)
    assert f"leaves out {margin} at a crop's inner faces: {share} % of a crop counts" in note
