from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from ldct_dist.errors import UserError
from ldct_dist.models.registry import outline
from ldct_dist.train.config import RunConfig
from ldct_dist.train.preflight import (
    note_on_margin,
    note_on_padding,
    refuse_slow_bf16,
    refuse_without_compiler,
)
from stores import make_store


@pytest.mark.parametrize(("device", "needed"), [("cpu", r"g\+\+"), ("cuda", "icx or gcc or clang")])
def test_a_node_without_a_compiler_is_told_of_before_a_run_that_compiles(
    tmp_path, monkeypatch, device, needed
):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", "icx")
    with pytest.raises(UserError, match=f"compile=true needs {needed} on "):
        refuse_without_compiler(torch.device(device))
    for name in ("g++", "clang"):
        (tmp_path / name).touch(0o755)
    refuse_without_compiler(torch.device(device))


def test_a_gpu_that_only_emulates_bf16_is_refused_as_the_planner_refuses_it(monkeypatch):
    major = 8
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: major >= 8 or including_emulation
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    refuse_slow_bf16(torch.device("cuda", 0), channels_last=True)
    major = 7
    with pytest.raises(UserError, match=r"Tesla V100 .*emulates it.*precision=fp32"):
        refuse_slow_bf16(torch.device("cuda", 0), channels_last=True)
    refuse_slow_bf16(torch.device("cpu"), channels_last=False)


@pytest.mark.parametrize(("version", "slow"), [(90701, False), (91002, True), (91500, False)])
def test_a_layout_that_cudnn_is_not_used_for_is_refused(monkeypatch, version, slow):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    refuse_slow_bf16(torch.device("cuda", 0), channels_last=True)
    with pytest.raises(UserError, match=r"cuDNN 91002.*channels_last=true") if slow else nullcontext():
        refuse_slow_bf16(torch.device("cuda", 0), channels_last=False)


def test_what_the_loss_leaves_out_is_told_of_the_volumes_that_there_are(tmp_path):
    config = RunConfig(name="run", store=tmp_path, steps=1, data={"crop": (32, 24, 24)})
    model = outline(config.model)
    stores = [make_store(tmp_path / f"{n}.zarr", [(30, 24, 24), (n, 24, 24)]) for n in (30, 33)]
    assert note_on_margin(config, model, stores[0]) is None  # nothing: no crop has a face within a volume
    note = note_on_margin(config, model, stores[1])
    assert "note: 38 % of a crop's voxels count in the loss. It leaves out (10, 0, 0) voxels" in note


def test_a_crop_that_is_mostly_padding_is_told_of(tmp_path):
    store = make_store(tmp_path / "ct.zarr", [(14, 96, 96), (12, 96, 96)])
    for depth, share in ((16, None), (64, 78)):
        config = RunConfig(name="run", store=tmp_path, steps=1, data={"crop": (depth, 48, 48)})
        note = note_on_padding(config, store)
        assert (note is None) if share is None else (f"at least {share} % of every crop is padding" in note)
