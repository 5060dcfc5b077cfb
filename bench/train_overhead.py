"""What the trainer costs over a bare torch loop: same network, same crops, one process, steps taken in turn.

    python bench/train_overhead.py [--steps 40]

The bare loop holds one batch in memory and does forward, loss, backward, clip and optimizer step. Ours
does the same and everything else a run does: data from a store, moving average, learning rate, agreement
between ranks, loss log, TensorBoard, and checkpoints beside it. overhead = ours / bare - 1, medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from ldct_dist.ct.volume import Volume
from ldct_dist.data.loader import Batch
from ldct_dist.models.execution import lay_out
from ldct_dist.models.losses import build_loss, mask_from_box
from ldct_dist.models.registry import build
from ldct_dist.store import layout
from ldct_dist.train.config import RunConfig
from ldct_dist.train.stop import Stop
from ldct_dist.train.trainer import Trainer
from ldct_dist.world import World

CROP = (8, 64, 64)  # two of them make a bare step of 100 to 300 ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)  # leaves the second core to the loader, as a GPU would
    with tempfile.TemporaryDirectory() as folder:
        config = RunConfig(
            name="overhead",
            runs=Path(folder),
            store=make_store(Path(folder) / "ct.zarr"),
            steps=steps + 3,  # the last one would end the run
            data={"crop": CROP, "batch": 2},
            model={"size": "xs"},
            validation={"every": 10**6},
            checkpoint={"every": max(2, steps // 2)},
            log={"every": 10},
        )
        ours, bare = measure(config, steps)
    figures = {
        "overhead": round(statistics.median(ours) / statistics.median(bare) - 1, 4),
        "bare_step_ms": round(1000 * statistics.median(bare), 1),
        "our_step_ms": round(1000 * statistics.median(ours), 1),
        "steps": steps,
    }
    print(json.dumps(figures))


def make_store(path: Path) -> Path:
    layout.create(path)
    random = np.random.default_rng(0)
    for i in range(4):
        full, low = (
            Volume(random.normal(40, s, (48, 256, 256)).astype(np.int16), (5, 0.7, 0.7)) for s in (10, 20)
        )
        layout.write_case(path, f"case-{i}", {1.0: full, 0.25: low}, patient=f"{i}", split="train")
    layout.finalise(path)
    return path


def measure(config: RunConfig, steps: int) -> tuple[list[float], list[float]]:
    """Seconds of our steps and of bare ones, taken in turn so that the machine's moods hit both alike."""
    with Stop() as stop:
        trainer = Trainer(config, World(), stop)
        with trainer.watch, trainer.loader, trainer.monitor:
            trainer.take_up()
            bare_step = bare_loop(config, trainer.loader.batch(0))
            ours, bare = [], []
            for _ in range(steps + 2):
                ours.append(seconds(trainer.advance))
                bare.append(seconds(bare_step))
            trainer.checkpoints.saver.finish()
    return ours[2:], bare[2:]  # the first two warm up


def bare_loop(config: RunConfig, batch: Batch):
    model = build(config.model)
    lay_out(model, channels_last=True)
    optim = config.optim
    optimizer = torch.optim.AdamW(model.parameters(), lr=optim.lr, betas=optim.betas, fused=True)
    loss = build_loss(config.loss)
    low, full = batch.low.clone(), batch.full.clone()
    mask = mask_from_box(batch.box, low.shape[2:], config.loss.margin_for(model.radius, config.data.crop))

    def step() -> None:
        optimizer.zero_grad()
        loss(model(low), full, mask).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def seconds(act) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
