"""What `ldct-dist plan` says, held against arithmetic by hand and against tensors that are really there."""

from __future__ import annotations

import gc
import io
import json
import re
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from torch._subclasses.fake_tensor import FakeTensorMode

from commands import command
from ldct_dist.cli.runs import plan as verb
from ldct_dist.errors import UserError
from ldct_dist.models.losses import build_loss
from ldct_dist.models.registry import build
from ldct_dist.train.config import RunConfig
from ldct_dist.train.cost.count import count
from ldct_dist.train.cost.gpus import GPUS, peak_of_device
from ldct_dist.train.cost.memory import PROCESS, STRATEGIES, Activations, memory, node
from ldct_dist.train.cost.plan import Plan, plan
from ldct_dist.train.cost.table import print_plan
from ldct_dist.train.strategy.ddp import DDPStrategy
from ldct_dist.world import World
from on_gpu import on_gpu

CROP = (8, 32, 32)


def run_config(**changes: Any) -> RunConfig:
    config: dict[str, Any] = {
        "name": "run",
        "store": "nowhere",
        "steps": 1000,
        "data": {"crop": CROP, "batch": 16},
        "model": {"size": "xs"},
        "loss": {"margin": (0, 0, 0)},
    }
    for key, value in changes.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    return RunConfig(**config)


def forward_flops(name: str) -> tuple[int, int]:
    """Of one crop, from what each layer is given and gives: of all, and of the first."""
    model = build(run_config(model={"name": name}).model)
    each: list[int] = []

    def add(layer: Any, inputs: tuple[torch.Tensor], answer: torch.Tensor) -> None:
        # every weight meets each voxel of the smaller side once, in a multiplication and an addition
        small = inputs[0] if isinstance(layer, torch.nn.ConvTranspose3d) else answer
        each.append(2 * layer.weight.numel() * small[0, 0].numel())

    for layer in model.modules():
        if isinstance(layer, (torch.nn.Conv3d, torch.nn.ConvTranspose3d)):
            layer.register_forward_hook(add)
    with torch.inference_mode():
        model(torch.zeros(1, 1, *CROP))
    return sum(each), each[0]


@pytest.mark.parametrize("name", ["unet3d", "nafnet3d", "redcnn3d"])
def test_flops_are_three_times_those_of_the_forward_pass_but_for_the_inputs_gradient(name):
    forward, first = forward_flops(name)
    assert count(run_config(model={"name": name}), 1).flops == 3 * forward - first


@pytest.mark.parametrize(
    ("name", "mode"),
    [("unet3d", "none"), ("unet3d", "selective"), ("unet3d", "full"), ("nafnet3d", "selective")],
)
def test_what_the_forward_pass_leaves_is_what_it_really_leaves(name, mode):
    """Bytes of all storages that autograd keeps, read off a real forward pass."""
    config = run_config(model={"name": name, "activation_checkpointing": mode})
    model = build(config.model)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    hu = torch.randn(2, 1, *CROP).contiguous(memory_format=torch.channels_last_3d)
    full, mask = torch.zeros_like(hu), torch.ones_like(hu, dtype=torch.bool)
    given = {t.untyped_storage().data_ptr() for t in (hu, full)}
    kept: dict[int, int] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights | given:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = build_loss(config.loss)(model(hu), full, mask).sum()
    predicted = count(config, 2).saved
    assert predicted == pytest.approx(sum(kept.values()), rel=0.03)
    del loss
    gc.collect()


def test_recomputation_takes_less_memory_and_more_arithmetic_the_more_levels_it_covers():
    costs = [
        count(run_config(model={"activation_checkpointing": m}), 4) for m in ("none", "selective", "full")
    ]
    assert costs[0].peak > 1.2 * costs[1].peak > 1.4 * costs[2].peak
    done = [sum(op.flops for op in cost.ops) for cost in costs]
    assert done[0] < done[1] < done[2]
    assert costs[0].flops == costs[1].flops == costs[2].flops


def test_bf16_halves_activations_and_adds_copies_of_the_weights():
    big = {"data": {"crop": (8, 64, 64)}}
    fp32, bf16 = (count(run_config(precision=p, **big), 2).peak for p in ("fp32", "bf16"))
    assert 0.5 * fp32 < bf16 < 0.65 * fp32


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_plan_is_the_same_on_a_cpu_whose_convolutions_do_not_keep_channels_last(precision, monkeypatch):
    """As in bf16 on those that cannot multiply it: it counted copies that no GPU makes."""
    here = count(run_config(precision=precision), 2)
    with monkeypatch.context() as patched:
        patched.setattr(torch._C, "_conv_determine_backend_memory_format", lambda *_: torch.contiguous_format)
        FakeTensorMode.cache_clear()
        there = count(run_config(precision=precision), 2)
    FakeTensorMode.cache_clear()
    assert there == here


def test_larger_micro_batches_and_crops_are_as_large_as_foretold():
    config, wide = (
        run_config(precision="bf16", model={"size": "s"}, data={"crop": crop}) for crop in (CROP, (8, 96, 64))
    )
    activations = Activations.of(config)
    assert activations.peak(5) == pytest.approx(count(config, 5).peak, rel=0.01)
    assert activations.peak(6) == pytest.approx(count(wide, 1).peak, rel=0.01)


@pytest.mark.parametrize(
    ("name", "size", "mode"),
    [
        ("unet3d", "s", "none"),
        ("unet3d", "l", "full"),
        ("unet3d", "xxl", "none"),
        ("nafnet3d", "m", "selective"),
        ("nafnet3d", "l", "full"),
    ],
)
def test_a_step_on_a_gpu_takes_the_memory_that_is_foretold(name, size, mode):
    on_gpu(_as_foretold, name, size, mode, values=False)


def _as_foretold(name, size, mode):
    crops = 32 if size == "s" else 2  # against which what cuDNN takes to work in is little
    config = run_config(
        precision="bf16",
        data={"crop": (32, 128, 128), "batch": crops},
        model={"name": name, "size": size, "activation_checkpointing": mode},
    )
    gpu, loss = torch.device("cuda", 0), build_loss(config.loss)
    foretold = memory(STRATEGIES[0], config, Activations.of(config), crops, crops, 1).without_batches_ahead
    before = torch.cuda.max_memory_allocated()
    strategy = DDPStrategy(build(config.model), config, World(device=gpu))
    low, full = (torch.zeros(crops, 1, *config.data.crop, device=gpu) for _ in range(2))
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        each = loss(strategy(low), full, torch.ones_like(low, dtype=torch.bool))
        strategy.backward(each.mean())
        del each
        strategy.clip()
        strategy.step(1e-3)
        strategy.forget_gradients()
    simulated = torch.cuda.get_device_name() == "simulated"
    assert foretold == pytest.approx(
        torch.cuda.max_memory_allocated() - before, rel=0.02 if simulated else 0.15
    )


def test_parts_are_those_of_the_zero_paper():
    """12 bytes a parameter of optimizer state beside weights of 2 and gradients of 4, shared out stage by stage; but for
    small weights, which ZeRO 3 keeps whole."""
    config = run_config(precision="bf16", data={"batch": 64}, model={"size": "l"})
    activations = Activations.of(config)
    p = activations.few.parameters
    parts = {s.name: memory(s, config, activations, 1, 1, 64) for s in STRATEGIES}
    shares = {k: [round(64 * x / p) for x in (m.weights, m.gradients, m.optimizer)] for k, m in parts.items()}
    assert shares["zero 1"] == [128, 256, 12]
    assert shares["zero 2"] == [128, 4, 12]
    assert shares["zero 3"] == [2, 4, 12]
    assert shares["zero 3 offload"] == shares["zero 3 nvme"] == [0, 0, 0]
    ddp = parts["ddp"]
    assert (ddp.weights + ddp.gradients + ddp.optimizer + ddp.ema) == 20 * p


def test_what_a_node_holds_is_what_its_ranks_were_seen_to_take():
    """Measured: unet3d-l under ZeRO 3 in bf16 on one rank, memory of its own at most: 5043 MiB with its state on the CPU,
    1788 MiB on a disk, of which 995 are torch's and what would be on a GPU."""
    config = run_config(precision="bf16", data={"memory_mib": 64})
    kinds = {s.name: node(s, config, 98_000_000, 1, 8) for s in STRATEGIES}
    held = {name: (kind.memory - PROCESS) / 2**20 - 64 for name, kind in kinds.items()}
    assert held["zero 3 offload"] == pytest.approx(5043 - 995, rel=0.1)
    assert held["ddp"] == pytest.approx(16 * 98e6 / 2**20)  # the copy that is saved
    # the first weights, and the gradients' sums
    assert held["zero 3 nvme"] == pytest.approx(1788 - 995, rel=0.1)
    assert kinds["zero 3 nvme"].disk == pytest.approx(38 * 98e6)
    # where ranks share the copy out, each still begins with the whole network
    assert node(STRATEGIES[0], config, 98_000_000, 64, 8).memory == 8 * (PROCESS + (64 << 20) + 4 * 98e6)


def test_a_billion_parameters_are_planned_without_memory():
    config = run_config(
        precision="bf16",
        model={"size": "xxl"},
        data={"crop": (32, 256, 256), "batch": 256},
        loss={"margin": None},
    )
    made = plan(config, "a100-40g", [8, 64])
    rows = {(row.strategy, row.gpus): row for row in made.rows}
    assert made.parameters > 1e9
    assert made.counted == pytest.approx((12 / 32) * (160 / 256) ** 2)
    assert rows["ddp", 64].micro_batch is None  # 20 bytes a parameter alone are half of it
    assert rows["ddp", 64].times is None
    sharded = rows["zero 3", 64]
    assert sharded.micro_batch is not None
    assert sharded.times is not None
    assert [fit.fits for fit in sharded.fits] == sorted((fit.fits for fit in sharded.fits), reverse=True)
    assert sharded.largest_crop is not None
    assert sharded.largest_crop > rows["zero 1", 64].largest_crop
    # the same crops seen, in about the same GPU-hours, in an eighth of the time
    few = rows["zero 3", 8].times
    assert few is not None
    assert few.hours / sharded.times.hours == pytest.approx(8, rel=0.1)


def test_a_largest_crop_fits_and_the_next_does_not():
    config = run_config(precision="bf16", model={"size": "l"})
    row = next(r for r in plan(config, "a100-40g", [8]).rows if r.strategy == "ddp")
    z, y, x = row.largest_crop
    bigger = (z, y + 8, x + 8) if y < 512 else (z + 1, y, x)
    for crop, fits in (((z, y, x), True), (bigger, False)):
        same = run_config(precision="bf16", model={"size": "l"}, data={"crop": crop, "batch": 8})
        assert next(r for r in plan(same, "a100-40g", [8]).rows).fits[0].fits is fits


def test_communication_costs_scaling_where_the_network_is_slow():
    config = run_config(model={"size": "m"}, data={"batch": 512})
    ddp = {r.gpus: r.times for r in plan(config, "v100-32g", [1, 8, 512]).rows if r.strategy == "ddp"}
    assert ddp[1].sent == 0
    assert ddp[1].efficiency == 1
    assert ddp[8].sent == 2 * 7 / 8 * 4 * build_parameters(config)
    assert ddp[512].efficiency < ddp[8].efficiency


def test_zero_sends_what_deepspeed_was_counted_to_send():
    """In units of (n - 1) / n bytes a parameter: an all-reduce in fp32 is 8, a scatter 4, a gather of weights in bf16 2."""
    for size, micro_batch, sent in (
        # one bucket holds all gradients of m, so ZeRO 3 keeps the weights from forward to backward
        ("m", None, {"ddp": 8, "zero 1": 8 + 2, "zero 2": 8 + 2, "zero 3": 4 + 2}),
        ("m", 1, {"ddp": 8, "zero 1": 8 + 2, "zero 2": 2 * 8 + 2, "zero 3": 2 * (4 + 2)}),
    ):
        config = run_config(precision="bf16", model={"size": size}, micro_batch=micro_batch)
        rows = {row.strategy: row.times for row in plan(config, "h100-80g", [8]).rows}
        unit = 7 / 8 * build_parameters(config)
        assert {name: rows[name].sent / unit for name in sent} == pytest.approx(sent)


def test_each_place_further_off_costs_time():
    config = run_config(precision="bf16", model={"size": "l"})
    rows = {row.strategy: row.times for row in plan(config, "a100-40g", [8]).rows}
    step_s = [rows[name].step_s for name in ("zero 3", "zero 3 offload", "zero 3 nvme")]
    assert step_s == sorted(step_s)
    # eight ranks read and write 44 bytes a parameter at the node's 2 GB/s
    assert step_s[2] - step_s[1] >= 44 * build_parameters(config) / 2e9


def build_parameters(config: RunConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build(config.model).parameters())


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA A100-SXM4-40GB", "fp32", 156e12),
        ("Tesla V100-SXM2-32GB", "bf16", None),
        ("NVIDIA GH200 480GB", "bf16", 989e12),
        ("NVIDIA L40S", "fp32", 183e12),
        ("NVIDIA A40", "bf16", 150e12),
        ("NVIDIA RTX A4000", "bf16", None),
        ("NVIDIA GeForce RTX 5090", "bf16", None),
    ],
)
def test_a_devices_peak_goes_by_its_name(name, precision, peak):
    assert peak_of_device(name, precision) == peak


@pytest.mark.parametrize(
    ("gpu", "gpus", "changes", "words"),
    [
        ("h100", [8], {}, f"known are {', '.join(GPUS)}"),
        ("v100-32g", [8], {"precision": "bf16"}, "v100-32g is planned for in fp32"),
        ("h100-80g", [0], {}, "from 1 to 1000000"),
        ("h100-80g", [99_999_999_999], {}, "from 1 to 1000000"),
        ("h100-80g", [8], {"data": {"crop": (8, 32, 36)}}, "multiples of"),
        ("h100-80g", [8], {"loss": {"margin": (4, 0, 0)}}, "leaves nothing of a crop"),
    ],
)
def test_what_cannot_be_planned_is_one_line(gpu, gpus, changes, words):
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        plan(run_config(**changes), gpu, gpus)


def test_a_row_of_another_run_than_the_configs_says_so():
    made = plan(run_config(steps=1000, data={"batch": 32}), "h100-80g", [8, 64, 8])
    words = {row.gpus: row.changed for row in made.rows}
    assert list(words) == [8, 64]
    assert len(made.rows) == 2 * len(STRATEGIES)  # a number that is given twice is planned once
    assert words[8] is None
    assert words[64] == (
        "data.batch 32 -> 64, steps 1000 -> 500: the config's batch cannot be shared evenly by 64 GPUs"
    )
    assert made.as_json()["rows"][-1]["changed"] == words[64]
    assert words[64] in printed(made, 200)


def printed(made: Plan, width: int) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    print_plan(made, console)
    return console.export_text()


def test_a_small_networks_memory_is_in_mib_and_a_narrow_console_has_words():
    made = plan(run_config(), "h100-80g", [1])
    assert "MiB a GPU, of 73.6 GiB usable" in printed(made, 80)
    narrow = printed(made, 40)
    weights = 4 * made.parameters / 2**20
    assert f"ddp: micro 1, weights {weights:.2f}, grads" in " ".join(narrow.split())
    assert "\u2026" not in narrow


def test_a_table_fits_a_terminal_and_says_what_does_not_fit_the_gpu():
    big = run_config(model={"size": "xxl"}, data={"crop": (32, 512, 512), "batch": 32})
    text = printed(plan(big, "a100-40g", [8]), 80)
    assert "1.03 G parameters" in text
    assert "\u2026" not in text  # nothing cut off
    assert re.search(r"^ ddp +1 .*!\s*$", text, re.MULTILINE)


def test_the_verb_gives_json_or_one_line(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run_config().model_dump(mode="json")))
    told = json.loads(command("plan", path, "--gpus", "8", "--json").stdout)
    assert told["rows"][0]["fits"][0]["memory"]["weights"] == 4 * told["parameters"]
    with pytest.raises(UserError, match="--gpus 8,x: give numbers"):
        verb(path, gpus="8,x")
