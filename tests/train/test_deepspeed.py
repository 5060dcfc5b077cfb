"""ZeRO trains as DDP does, and a run may change between them, their stages and numbers of ranks as it goes on."""

from __future__ import annotations

import os
import sys
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from plants import spoilt, together
from torch.utils.cpp_extension import _get_build_directory

from commands import command
from forked import fork
from ldct_dist import config as configs
from ldct_dist.checkpoint import pieces
from ldct_dist.denoise.tiles import denoise_volume
from ldct_dist.errors import UserError
from ldct_dist.models.registry import build
from ldct_dist.models.weights import load_weights
from ldct_dist.train.config import RunConfig
from ldct_dist.train.ending import Ending
from ldct_dist.train.stop import Stop
from ldct_dist.train.strategy import engine
from ldct_dist.train.strategy.config import BUCKET
from ldct_dist.train.strategy.engine import build_adam, refuse_contradictions, refuse_deepspeed
from ldct_dist.train.trainer import Trainer
from ldct_dist.world import World
from runs import equal, final_state, losses, same, unsharded, write_config
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


ADAM_ON_CPU = Path(_get_build_directory("cpu_adam", verbose=False), "cpu_adam.so").exists()
with_adam_on_cpu = pytest.mark.skipif(
    not ADAM_ON_CPU,
    reason="needs DeepSpeed's Adam for CPUs, which a run with deepspeed.optimizer=cpu compiles (g++, ninja; 2 minutes)",
)

NVME = ((2, "gpu", "bf16"), (3, "nvme", "fp32"))
"""stage, place of the parameters and precision of the runs on a disk"""


def zero(stage: int) -> dict:
    return {"strategy": "deepspeed", "zero": stage} if stage else {}


spoilt_step = partial(spoilt, {2: float("nan")})
"""a plant: a step that is not learnt from"""


def no_room(rank: int) -> None:
    """One rank finds the disk full when it is to write step 10 of the run broken-3."""
    write = pieces._File._write

    def written(self, at, given):
        if "broken-3" in str(self.path) and "step-00000010" in str(self.path):
            self._error = OSError(28, "No space left on device")
        write(self, at, given)

    if rank == 1:
        pieces._File._write = written


def settings_of(settings, *given) -> dict:
    """The run's in DeepSpeed's words; with small buckets, small weights are shared out and gathered as well."""
    told = settings(*given)
    if engine.BUCKET < BUCKET:
        told["zero_optimization"]["stage3_param_persistence_threshold"] = 100
    return told


def train_all(runs: list[tuple[Path, float | None]], rank: int) -> None:
    """Train run after run in one process, each until its time is over; then end."""
    together(spoilt_step, no_room, rank)
    engine._settings = partial(settings_of, engine._settings)
    world = World.join(threads=1)
    for path, seconds in runs:
        engine.BUCKET = 20_000 if path.parent.name.startswith("buckets") else BUCKET
        with Stop(seconds, grace_s=30.0) as stop:
            trainer = Trainer(configs.read(RunConfig, path), world, stop)
            ending = trainer.fit()
        assert ending == (Ending.DONE if seconds is None else Ending.RESUMABLE)
        staged = sum(t.nbytes for t in trainer.checkpoints.saver._memory.values())
        path.with_name(f"staged-{rank}").write_text(str(staged))
    world.leave()
    sys.exit(0)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    shapes = [(16, 96, 96)] * 4 + [(4, 32, 32)]
    return make_store(tmp_path_factory.mktemp("zero") / "ct.zarr", shapes, ["train"] * 4 + ["val"]).path


@pytest.fixture(scope="module")
def trained(store, tmp_path_factory):
    """Folder of 20 steps by two ranks: PRECISION-STAGE; in fp32 also broken-STAGE, stopped and taken up,
    buckets-STAGE, which reduces and gathers in many pieces, rolled-STAGE, which goes back, and if what they need was
    compiled before offload, on the CPU, nvme-STAGE and broken-nvme-STAGE, in the folder nvme."""
    folder = tmp_path_factory.mktemp("trained")
    wanted: list[tuple[Path, float | None]] = []

    def configured(name: str, **changes) -> Path:
        (folder / name).mkdir()
        return write_config(folder / name, store, **{"steps": STEPS} | OPTIONS | changes)

    for precision, stage in product(("fp32", "bf16"), range(4)):
        path = configured(f"{precision}-{stage}", precision=precision, **zero(stage))
        wanted += [(path, None)]
    for stage in (1, 2, 3):
        path = configured(f"broken-{stage}", **zero(stage))
        wanted += [(path, 0.1), (path, 0.1), (path, None)]
        wanted += [(configured(f"buckets-{stage}", **zero(stage)), None)]
    for stage in (0, 3):
        path = configured(f"rolled-{stage}", guard={"patience": 1}, checkpoint={"every": 1}, **zero(stage))
        wanted += [(path, None)]
    if ADAM_ON_CPU:
        places = {"optimizer": "cpu", "parameters": "cpu"}
        wanted += [(configured("offload", deepspeed=places, **zero(3)), None)]
        (folder / "nvme").mkdir()
        for stage, parameters, precision in NVME:
            places = {"optimizer": "nvme", "parameters": parameters, "nvme_path": str(folder / "nvme")}
            whole, broken = (
                configured(name, deepspeed=places, precision=precision, **zero(stage))
                for name in (f"nvme-{stage}", f"broken-nvme-{stage}")
            )
            wanted += [(whole, None), (broken, 0.1), (broken, None)]
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
def test_a_network_larger_than_a_bucket_learns_bitwise_the_same(trained, stage):
    """Of xs, eight buckets; ZeRO 3 keeps none of its weights whole."""
    assert same(run_of(trained, f"buckets-{stage}"), run_of(trained, f"fp32-{stage}"))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_to_save_it_no_rank_holds_more_than_its_share(trained, stage):
    run = run_of(trained, f"fp32-{stage}")
    whole = sum(t.nbytes for t in final_state(run).values())
    staged = [int((trained / f"fp32-{stage}" / f"staged-{rank}").read_text()) for rank in (0, 1)]
    assert sum(staged) == whole
    assert max(staged) < 0.51 * whole


def test_a_rank_without_room_costs_a_checkpoint_and_holds_up_nobody(trained):
    kept = [
        sorted(p.name for p in (run_of(trained, f"broken-{i}") / "checkpoints").iterdir()) for i in (2, 3)
    ]
    assert sorted({*kept[0]} - {*kept[1]}) == ["step-00000010"]
    log = (trained / "start.log").read_text()
    assert log.count("a checkpoint was not written: rank 1") == log.count("No space left on device") == 1


def test_it_goes_back_to_its_last_checkpoint_as_ddp_does(trained):
    ours, ddp = (losses(run_of(trained, f"rolled-{stage}")) for stage in (3, 0))
    assert (trained / "start.log").read_text().count("went back to step 2, goes on with batch 3") == 2
    assert [line["step"] for line in ours] == [line["step"] for line in ddp]
    assert np.allclose([line["loss"] for line in ours], [line["loss"] for line in ddp], rtol=1e-5, atol=0)


@with_adam_on_cpu
def test_with_all_of_it_on_the_cpu_it_learns_the_same(trained):
    assert np.allclose(curve(run_of(trained, "offload")), curve(run_of(trained, "fp32-0")), rtol=1e-5, atol=0)


@with_adam_on_cpu
def test_with_all_of_it_on_a_disk_it_is_bitwise_the_run_on_the_cpu(trained):
    assert same(run_of(trained, "nvme-3"), run_of(trained, "offload"))


@with_adam_on_cpu
@pytest.mark.parametrize(("stage", "precision"), [(stage, precision) for stage, _, precision in NVME])
def test_on_a_disk_stopped_and_taken_up_it_is_bitwise_the_unbroken_run(trained, stage, precision):
    whole, rtol = run_of(trained, f"nvme-{stage}"), {"fp32": 1e-5, "bf16": 2e-2}[precision]
    assert np.allclose(curve(whole), curve(run_of(trained, f"{precision}-0")), rtol=rtol, atol=0)
    assert same(run_of(trained, f"broken-nvme-{stage}"), whole)


@with_adam_on_cpu
def test_on_the_cpu_a_new_adam_takes_each_step_bitwise_as_one_that_took_all_before_it():
    config = RunConfig(
        name="run", store="store", steps=1, model={"size": "xs"}, deepspeed={"optimizer": "cpu"}
    )
    whole, broken = build(config.model), build(config.model)
    broken.load_state_dict(whole.state_dict())
    ours, state = build_adam(whole, config, World()), {}
    for _ in range(8):
        new = build_adam(broken, config, World())
        new.state.update(state)
        for p, q in zip(whole.parameters(), broken.parameters(), strict=True):
            p.grad = q.grad = torch.randn_like(p)
        ours.step()
        new.step()
        state = dict(new.state)
        assert equal(dict(broken.named_parameters()), dict(whole.named_parameters()))


@with_adam_on_cpu
def test_on_a_disk_it_takes_no_memory_to_save_and_leaves_nothing_there(trained):
    assert [(trained / "nvme-3" / f"staged-{rank}").read_text() for rank in (0, 1)] == ["0", "0"]
    assert list((trained / "nvme").iterdir()) == []


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
    """DDP on 2 ranks, ZeRO 3 on 1, 1 on 2, 2 on 4 from a disk, 3 on 2, a step each, then DDP on 2; a byte changes on
    the way."""
    path = write_config(tmp_path, store, steps=STEPS, **OPTIONS)
    run, log = run_of(trained, "fp32-0"), path.with_suffix(".log")
    mine = tmp_path / "runs" / "run"
    on_disk = ("deepspeed.optimizer=nvme", f"deepspeed.nvme_path={tmp_path}") if ADAM_ON_CPU else ()
    for ranks, stage, places in ((2, 0, ()), (1, 3, ()), (2, 1, ()), (4, 2, on_disk), (2, 3, ())):
        options = [*places, *(f"{key}={value}" for key, value in zero(stage).items())]
        ends = fork(path, "time_limit_s=0.1", *options, ranks=ranks, plant=spoilt_step)
        assert ends == [75] * ranks, log.read_text()
    assert command("verify", mine).returncode == 0

    victim = next((mine / "checkpoints" / "step-00000005").glob("optimizer-00001*"))
    raw = bytearray(victim.read_bytes())
    raw[-1] ^= 1
    victim.write_bytes(raw)
    told = command("verify", mine)
    assert told.returncode != 0
    assert victim.name in told.stdout + told.stderr

    assert fork(path, plant=spoilt_step) == [0, 0]
    assert "passed over checkpoint step-00000005" in log.read_text()
    assert "resumed at step 4" in log.read_text()
    assert np.allclose(curve(mine), curve(run), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"zero": 3}, "set it, or leave them out"),
        ({"strategy": "deepspeed", "deepspeed": {"optimizer": "cpu"}}, "set zero=1, 2 or 3"),
        ({**zero(2), "precision": "fp64"}, "has no fp64"),
        ({**zero(2), "compile": True}, "compile=false"),
        ({**zero(2), "deepspeed": {"parameters": "cpu"}}, "is for zero=3"),
        ({**zero(2), "deepspeed": {"parameters": "nvme"}}, "is for zero=3"),
        ({**zero(3), "deepspeed": {"optimizer": "nvme"}}, "needs nvme_path=FOLDER"),
        (
            {**zero(3), "deepspeed": {"optimizer": "nvme", "nvme_path": "/no/such"}},
            r"nvme_path=/no/such on .* is not a folder you may write to",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(changes, words):
    config = RunConfig.model_validate({"name": "x", "store": "x", "steps": 1} | changes)

    def refuse() -> None:
        refuse_contradictions(config)
        refuse_deepspeed(config, World())

    with pytest.raises(UserError, match=words):
        refuse()


def test_a_compiler_that_was_killed_is_named_and_none_waits_for_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, (0, 0))
    config = {"name": "x", "store": "x", "steps": 1, "deepspeed": {"optimizer": "cpu"}, **zero(1)}
    with pytest.raises(UserError, match=rf"{lock} has been there .* delete it"):
        refuse_deepspeed(RunConfig.model_validate(config), World())
    assert f"compiled, once, into {lock.parent}: a minute or two" in capsys.readouterr().out


def test_without_deepspeed_the_refusal_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    config = RunConfig.model_validate({"name": "x", "store": "x", "steps": 1, **zero(1)})
    with pytest.raises(UserError, match=r"pip install 'ldct_dist\[deepspeed\]'"):
        refuse_deepspeed(config, World())
