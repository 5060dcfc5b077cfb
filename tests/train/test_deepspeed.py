"""ZeRO trains as DDP does, and a run may change between them, their stages and numbers of ranks as it goes on."""

from __future__ import annotations

import sys
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from plants import spoilt

from commands import command
from forked import fork
from ldct_dist import config as configs
from ldct_dist.denoise.tiles import denoise_volume
from ldct_dist.models.weights import load_weights
from ldct_dist.train.config import RunConfig
from ldct_dist.train.ending import Ending
from ldct_dist.train.stop import Stop
from ldct_dist.train.trainer import Trainer
from ldct_dist.world import World
from runs import equal, final_state, losses, unsharded, write_config
from stores import make_store

STEPS = 20
OPTIONS = {
    "data": {"crop": [4, 16, 16], "batch": 4},
    "micro_batch": 1,
    "checkpoint": {"every": 10},
    "validation": {"every": 10},
}


def run_of(folder: Path, name: str) -> Path:
    return folder / name / "runs" / "run"


def zero(stage: int) -> dict:
    return {"strategy": "deepspeed", "zero": stage} if stage else {}


def train_all(runs: list[tuple[Path, float | None]], rank: int) -> None:
    """Train run after run in one process, each until its time is over; then end."""
    spoilt({2: float("nan")}, rank)  # a step that is not learnt from, in each of them
    world = World.join(threads=1)
    for path, seconds in runs:
        with Stop(seconds, grace_s=30.0) as stop:
            ending = Trainer(configs.read(RunConfig, path), world, stop).fit()
        assert ending == (Ending.DONE if seconds is None else Ending.RESUMABLE)
    world.leave()
    sys.exit(0)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    shapes = [(16, 96, 96)] * 4 + [(4, 32, 32)]
    return make_store(tmp_path_factory.mktemp("zero") / "ct.zarr", shapes, ["train"] * 4 + ["val"]).path


@pytest.fixture(scope="module")
def trained(store, tmp_path_factory):
    """Folder of 20 steps by two ranks: PRECISION-STAGE, and in fp32 also broken-STAGE, stopped and taken up."""
    folder = tmp_path_factory.mktemp("trained")
    wanted: list[tuple[Path, float | None]] = []

    def configured(name: str, **changes) -> Path:
        (folder / name).mkdir()
        return write_config(folder / name, store, steps=STEPS, **OPTIONS, **changes)

    for precision, stage in product(("fp32", "bf16"), range(4)):
        path = configured(f"{precision}-{stage}", precision=precision, **zero(stage))
        wanted += [(path, None)]
    for stage in (1, 2, 3):
        path = configured(f"broken-{stage}", **zero(stage))
        wanted += [(path, 0.1), (path, 0.1), (path, None)]
    start = folder / "start.yaml"
    assert fork(start, plant=partial(train_all, wanted)) == [0, 0], start.with_suffix(".log").read_text()
    return folder


def curve(run: Path) -> list[float]:
    return [line["loss"] for line in losses(run) if line["applied"]]


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(("precision", "rtol"), [("fp32", 1e-5), ("bf16", 2e-2)])
def test_zero_learns_what_ddp_learns(trained, precision, rtol, stage):
    ours, ddp = run_of(trained, f"{precision}-{stage}"), run_of(trained, f"{precision}-0")
    assert len(curve(ddp)) == STEPS - 1
    assert np.allclose(curve(ours), curve(ddp), rtol=rtol, atol=0)
    norms = [[line["grad_norm"] for line in losses(run) if line["applied"]] for run in (ours, ddp)]
    assert np.allclose(*norms, rtol=max(rtol, 1e-4), atol=0)
    assert [line["applied"] for line in losses(ours)] == [line["applied"] for line in losses(ddp)]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_checkpoint_is_the_one_that_ddp_writes(trained, stage):
    ours, ddp = (unsharded(final_state(run_of(trained, f"fp32-{i}"))) for i in (stage, 0))
    assert ours.keys() == ddp.keys()
    for name, tensor in ddp.items():
        assert torch.allclose(ours[name], tensor, rtol=1e-3, atol=1e-5), name


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_stopped_and_taken_up_it_is_bitwise_the_unbroken_run(trained, stage):
    broken, whole = run_of(trained, f"broken-{stage}"), run_of(trained, f"fp32-{stage}")
    assert losses(broken) == losses(whole)
    assert equal(final_state(broken), final_state(whole))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_its_weights_denoise(trained, stage):
    weights = run_of(trained, f"bf16-{stage}") / "checkpoints" / f"step-{STEPS:08d}" / "weights.safetensors"
    hu = np.random.default_rng(0).integers(-200, 200, (4, 32, 32)).astype(np.int16)
    denoised = denoise_volume(load_weights(weights), hu)
    reference = denoise_volume(load_weights(Path(str(weights).replace(f"bf16-{stage}", "bf16-0"))), hu)
    assert np.abs(denoised - hu).max() > 0
    assert np.abs(denoised - reference).max() <= 2


def test_a_run_goes_on_by_any_strategy_at_any_number_of_ranks_past_a_damaged_checkpoint(
    store, trained, tmp_path
):
    """DDP on 2 ranks, ZeRO 3 on 1, 1 on 2, 2 on 4, 3 on 2, a step each, then DDP on 2; a byte changes on the way."""
    path = write_config(tmp_path, store, steps=STEPS, **OPTIONS)
    run, log = run_of(trained, "fp32-0"), path.with_suffix(".log")
    mine = tmp_path / "runs" / "run"
    for ranks, stage in ((2, 0), (1, 3), (2, 1), (4, 2), (2, 3)):
        options = [f"{key}={value}" for key, value in zero(stage).items()]
        ends = fork(path, "time_limit_s=0.1", *options, ranks=ranks, plant=partial(spoilt, {2: float("nan")}))
        assert ends == [75] * ranks, log.read_text()
    assert command("verify", mine).returncode == 0

    victim = next((mine / "checkpoints" / "step-00000005").glob("optimizer-00001*"))
    raw = bytearray(victim.read_bytes())
    raw[-1] ^= 1
    victim.write_bytes(raw)
    told = command("verify", mine)
    assert told.returncode != 0
    assert victim.name in told.stdout + told.stderr

    assert fork(path, plant=partial(spoilt, {2: float("nan")})) == [0, 0]
    assert "passed over checkpoint step-00000005" in log.read_text()
    assert "resumed at step 4" in log.read_text()
    assert np.allclose(curve(mine), curve(run), rtol=1e-5, atol=0)
