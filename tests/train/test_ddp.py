"""What DDP does beside training."""

from __future__ import annotations

import pytest
from plants import gradients_places

from forked import fork
from ldct_dist.models.registry import ModelConfig, build
from ldct_dist.train.config import RunConfig
from ldct_dist.train.strategy import ddp
from ldct_dist.train.strategy.ddp import DDPStrategy
from ldct_dist.train.strategy.parts import MOMENTS, parts_of
from ldct_dist.world import World
from runs import write_config
from stores import make_store


@pytest.mark.parametrize(("micro_batch", "crops"), [(None, 4), (3, 3), (64, 4)])
def test_the_first_pass_takes_no_more_memory_than_a_step(monkeypatch, micro_batch, crops):
    config = RunConfig.model_validate(
        {
            **{"name": "x", "store": "x", "steps": 1, "micro_batch": micro_batch},
            **{"data": {"crop": [4, 8, 8], "batch": 8}, "model": {"size": "xs"}},
        }
    )
    strategy = DDPStrategy(build(config.model), config, World())
    strategy.world = World(0, 2)
    monkeypatch.setattr(ddp, "DistributedDataParallel", lambda network, **_: network)
    seen, forward = [], DDPStrategy.__call__
    monkeypatch.setattr(DDPStrategy, "__call__", lambda self, hu: seen.append(len(hu)) or forward(self, hu))
    strategy.warm_up()
    assert set(seen) == {crops}


def test_more_ranks_than_moments_write_no_file_that_is_empty():
    model = build(ModelConfig(size="xs"))
    weights = dict(model.named_parameters())
    moments = {f"{name}/{moment}": values for name, values in weights.items() for moment in MOMENTS}
    parts = parts_of(weights, weights, moments, model.config, step=1, files=10_000)
    assert len(parts) == 2 + len(moments)
    assert all(part.tensors for part in parts.values())


def test_ranks_say_nothing_of_strides_that_move_no_byte(tmp_path):
    make_store(tmp_path / "ct.zarr", [(12, 40, 40)])
    config = write_config(tmp_path, tmp_path / "ct.zarr", steps=2, model={"name": "redcnn3d", "size": "xs"})
    assert fork(config) == [0, 0]
    assert "strides" not in config.with_suffix(".log").read_text()


def test_gradients_are_held_once_however_many_micro_batches_a_step_has(tmp_path):
    make_store(tmp_path / "ct.zarr", [(12, 40, 40)])
    config = write_config(tmp_path, tmp_path / "ct.zarr", steps=2, micro_batch=1)
    assert fork(config, plant=gradients_places) == [0, 0]
    log = config.with_suffix(".log").read_text()
    for rank in range(2):
        places = [line for line in log.splitlines() if line.startswith(f"gradients of rank {rank}")]
        assert len(places) == 2 * 2  # steps, micro-batches
        assert len(set(places)) == 1
