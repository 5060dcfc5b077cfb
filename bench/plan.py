"""How well does `ldct-dist plan` predict memory? Predicted bytes against how much a training process on CPU really grows.

    python bench/plan.py

Each case trains two steps in a process of its own. Growth is the peak of resident memory (VmHWM) since before the
network was built; the network has run once by then, so that code, oneDNN's kernels and their caches are not counted.
glibc is told to return large freed blocks, or what it keeps would be measured as well. memory_error is the largest
|predicted / measured - 1| of the cases.
"""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys

import torch

from ldct_dist.models.losses import build_loss
from ldct_dist.models.registry import build
from ldct_dist.train.config import RunConfig
from ldct_dist.train.cost.memory import STRATEGIES, Activations, memory
from ldct_dist.train.strategy.ddp import DDPStrategy
from ldct_dist.world import World

CASES = [  # size, crop, crops, activation checkpointing
    ("s", (16, 96, 96), 2, "none"),
    ("s", (16, 96, 96), 2, "selective"),
    ("s", (16, 96, 96), 2, "full"),
    ("m", (8, 64, 64), 2, "none"),
]


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(measure(*CASES[int(sys.argv[1])])))
        return
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    rows = []
    for i in range(len(CASES)):
        command = [sys.executable, __file__, str(i)]
        rows.append(json.loads(subprocess.run(command, env=env, check=True, capture_output=True).stdout))
        print(rows[-1], flush=True)
    print(json.dumps({"memory_error": round(max(abs(r["ratio"] - 1) for r in rows), 3), "cases": rows}))


def measure(size: str, crop: tuple[int, int, int], crops: int, mode: str) -> dict:
    config = RunConfig(
        name="plan",
        store="nowhere",
        steps=1,
        data={"crop": crop, "batch": crops},
        model={"size": size, "activation_checkpointing": mode},
        loss={"margin": (0, 0, 0)},
    )
    parts = memory(STRATEGIES[0], config, Activations.of(config), crops, crops, 1)
    predicted = parts.without_batches_ahead
    train(config, 1)
    gc.collect()
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # the peak starts anew
    before = resident("VmRSS")
    train(config, 2)
    measured = resident("VmHWM") - before
    return {
        "size": size,
        "crop": crop,
        "crops": crops,
        "checkpointing": mode,
        "predicted_mib": round(predicted / 2**20, 1),
        "measured_mib": round(measured / 2**20, 1),
        "ratio": round(predicted / measured, 3),
    }


def train(config: RunConfig, steps: int) -> None:
    strategy = DDPStrategy(build(config.model), config, World())
    loss = build_loss(config.loss)
    shape = (config.data.batch, 1, *config.data.crop)
    for _ in range(steps):
        hu, full = torch.zeros(shape), torch.ones(shape)
        each = loss(strategy(hu), full, torch.ones(shape, dtype=torch.bool))
        strategy.backward(each.sum())
        strategy.clip()
        strategy.step(1e-3)
        strategy.forget_gradients()


def resident(key: str) -> int:
    with open("/proc/self/status") as f:
        found = re.search(rf"{key}:\s+(\d+) kB", f.read())
    assert found is not None
    return 1024 * int(found[1])


if __name__ == "__main__":
    main()
