"""One GPU a rank, or one clear line."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from ldct_dist.errors import UserError
from ldct_dist.rendezvous import own_device
from ldct_dist.world import World


@pytest.fixture
def node(monkeypatch):
    """A node where Slurm gave the job `given` GPUs, of which each task sees `visible`."""

    def make(given: int | None, visible: int) -> None:
        monkeypatch.setenv("SLURM_STEP_ID", "0")
        if given is not None:
            monkeypatch.setenv("SLURM_GPUS_ON_NODE", str(given))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: visible > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
        monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)

    return make


@pytest.mark.parametrize(("visible", "index"), [(4, 3), (1, 0)])
def test_a_rank_takes_its_own_gpu_whether_slurm_shows_it_all_or_one(node, visible, index):
    node(4, visible)
    assert own_device(3, 4) == torch.device("cuda", index)


@pytest.mark.parametrize(
    ("given", "visible", "ranks"), [(4, 2, 4), (4, 4, 2), (2, 2, 4), (1, 1, 2), (4, 0, 4)]
)
def test_a_wrong_number_of_gpus_is_one_line(node, given, visible, ranks):
    node(given, visible)
    with pytest.raises(UserError, match=f"{ranks} ranks on .*, {given} GPUs .* {visible} seen") as refused:
        own_device(1, ranks)
    assert ("torch without CUDA" in str(refused.value)) == (visible == 0)


def test_without_gpus_from_slurm_it_is_the_cpu(node):
    node(None, 0)
    assert own_device(1, 4) == torch.device("cpu")


@pytest.mark.parametrize("rank", [0, 2])
def test_ranks_that_share_a_gpu_end_in_one_line(monkeypatch, rank):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="GPU-1"))
    world = World(rank, 3, rank, 3, torch.device("cuda", 0))
    monkeypatch.setattr(World, "gather", lambda self, mine: [mine, ("node-2", "GPU-1"), mine])
    with pytest.raises(UserError if rank == 0 else SystemExit) as ended:
        world.refuse_uneven_gpus()
    assert "ranks 0, 2 share one GPU" in str(ended.value) if rank == 0 else ended.value.code == 2
    monkeypatch.setattr(World, "gather", lambda self, mine: [mine, ("node-2", "GPU-1"), ("node-1", "GPU-2")])
    world.refuse_uneven_gpus()


def test_a_node_without_gpus_among_others_ends_in_one_line(monkeypatch):
    world = World(0, 2, 0, 1)
    monkeypatch.setattr(World, "gather", lambda self, mine: [mine, ("node-2", "GPU-1")])
    with pytest.raises(UserError, match="see no GPU, others do"):
        world.refuse_uneven_gpus()
    monkeypatch.setattr(World, "gather", lambda self, mine: [mine, ("node-2", None)])
    world.refuse_uneven_gpus()
