"""What the simulated GPU finds: each of these a GPU would get wrong silently, or refuse."""

from __future__ import annotations

import pytest

from on_gpu import on_gpu


def test_it_finds_what_a_gpu_would_not_forgive():
    on_gpu(_mistakes_are_found)


def _mistakes_are_found():
    import torch

    if torch.cuda.get_device_name() != "simulated":
        return
    from simulated_gpu.streams import Race

    gpu = torch.device("cuda", 0)
    pinned, plain = torch.arange(4.0).pin_memory(), torch.arange(4.0)
    assert pinned.to(gpu, non_blocking=True).device == gpu
    with pytest.raises(RuntimeError, match="not pinned"):
        plain.to(gpu, non_blocking=True)
    with pytest.raises(RuntimeError, match="not pinned"):
        torch.arange(8.0)[::2].pin_memory().to(gpu, non_blocking=True)
    with pytest.raises(RuntimeError, match="on the GPU meet"):
        plain.to(gpu) + plain
    assert (plain.to(gpu) + 1).tolist() == [1, 2, 3, 4]

    copies, current = torch.cuda.Stream(gpu), torch.cuda.current_stream(gpu)
    with torch.cuda.stream(copies):
        made = pinned.to(gpu, non_blocking=True)
        event = copies.record_event()
    with pytest.raises(Race, match="has not waited"):
        made + 1
    current.wait_event(event)
    with pytest.raises(Race, match="record_stream"):
        made + 1
    made.record_stream(current)
    assert (made + 1).tolist() == [1, 2, 3, 4]
    with torch.cuda.stream(copies):
        made.mul_(2)
    with pytest.raises(Race, match="has not waited"):
        made[1:].sum()

    host = torch.zeros(4).pin_memory()
    host.copy_(plain.to(gpu), non_blocking=True)
    arrived = current.record_event()
    assert host.tolist() == [0, 0, 0, 0]
    arrived.synchronize()
    assert host.tolist() == [0, 1, 2, 3]
