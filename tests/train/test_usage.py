from __future__ import annotations

import pytest
import torch

from ldct_dist.train.config import RunConfig
from ldct_dist.train.cost.count import count
from ldct_dist.train.cost.usage import Usage
from ldct_dist.world import World

CONFIG = RunConfig(
    name="run",
    store="nowhere",
    steps=10,
    precision="bf16",
    data={"crop": (8, 32, 32), "batch": 16},
    model={"size": "xs"},
)


@pytest.fixture
def gpu(monkeypatch):
    """A world of four GPUs with this name, of which none is touched."""

    def make(name: str) -> World:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 << 30)
        return World(0, 4, 0, 4, torch.device("cuda", 0))

    return make


def test_mfu_is_a_gpus_share_of_the_flops_over_what_its_data_sheet_promises(gpu):
    told = Usage(CONFIG, gpu("NVIDIA A100-SXM4-80GB")).scalars(steps=5, seconds=2.0)
    flops = 4 * count(CONFIG, 1).flops  # 16 crops, four GPUs
    assert told["workload/flops_per_step_per_gpu"] == flops
    assert told["workload/mfu_percent"] == pytest.approx(100 * 2.5 * flops / 312e12)
    assert told["workload/voxels_per_s_per_rank"] == 2.5 * 4 * 8 * 32 * 32
    assert told["workload/peak_memory_gib"] == 3


def test_an_unknown_gpu_has_flops_and_no_mfu(gpu):
    told = Usage(CONFIG, gpu("NVIDIA Something New")).scalars(5, 2.0)
    assert told["workload/tflops_per_gpu"] > 0
    assert "workload/mfu_percent" not in told


def test_a_cpu_has_speed_and_memory_alone():
    told = Usage(CONFIG, World()).scalars(5, 2.0)
    assert told.keys() == {"workload/voxels_per_s_per_rank", "workload/peak_memory_gib"}
    assert 0.05 < told["workload/peak_memory_gib"] < 64
