"""How long does a save hold up training, against writing the same state synchronously?

One rank with a network and an Adam state of over 1 GB. Synchronous: torch.save of the same tensors, fsync. Ours: how
long the training thread waits for a save (in `save` itself, and in `staged`, before the optimizer may change the
weights), and how much longer steps take while a save is written beside them. The two take turns on the same disk.
Memory is what the process holds in addition to its state during a save.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ldct_dist.checkpoint import generation
from ldct_dist.checkpoint.pieces import Part
from ldct_dist.checkpoint.retention import CheckpointConfig
from ldct_dist.checkpoint.save import Saver
from ldct_dist.world import World

CACHE = Path(__file__).parent / ".cache" / "checkpoint"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1200, help="size of the state")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)  # of two cores; the other is free, as it is beside a GPU
    shutil.rmtree(CACHE, ignore_errors=True)
    CACHE.mkdir(parents=True)
    training = Training(options.mib)
    step_s = statistics.median(timed(training.step) for _ in range(5))
    saver = Saver(
        CACHE / "checkpoints",
        CACHE / "generations",
        generation.claim(CACHE / "generations"),
        CheckpointConfig(keep_last=1),
        World(),
    )
    with Peak() as usual:
        training.step()
    sync, stalls, during, extra = [], [], [], []
    for turn in range(options.repeats):
        sync.append(timed(lambda: save_synchronously(training.parts())))
        stall, slower, memory = save_beside(training, saver, turn + 1, step_s)
        stalls.append(stall)
        during.append(slower)
        extra.append(memory - usual.bytes)
        print(f"sync {sync[-1]:.2f} s, stall {stall:.3f} s, extra {extra[-1] / 2**20:.0f} MiB", flush=True)
    shutil.rmtree(CACHE)
    print(
        json.dumps(
            {
                "stall_vs_sync": statistics.median(stalls) / statistics.median(sync),
                "extra_memory_vs_state": max(extra) / training.nbytes,
                "slowdown_while_saving": statistics.median(during),
                "state_mib": training.nbytes / 2**20,
                "sync_s": statistics.median(sync),
                "stall_s": statistics.median(stalls),
                "step_s": step_s,
            }
        )
    )


class Training:
    """Weights with their Adam moments, and a step of some hundred ms in front of the optimizer's."""

    def __init__(self, mib: int) -> None:
        count = mib * 2**20 // 4 // 3 // 8
        self.weights = [torch.randn(count) for _ in range(8)]
        self.moments = [[torch.randn(count) for _ in range(2)] for _ in self.weights]
        self.nbytes = 8 * 3 * 4 * count
        self._convolution = torch.nn.Conv3d(16, 16, 3, padding=1)
        self._crop = torch.randn(1, 16, 24, 64, 64)

    def forward_backward(self) -> None:
        self._convolution(self._convolution(self._crop)).sum().backward()

    def optimize(self) -> None:
        for weight in self.weights:
            weight.mul_(0.999)

    def step(self) -> None:
        self.forward_backward()
        self.optimize()

    def parts(self) -> dict[str, Part]:
        weights = {str(i): w for i, w in enumerate(self.weights)}
        optimizer = {f"{i}/{k}": m for i, pair in enumerate(self.moments) for k, m in enumerate(pair)}
        return {"weights.safetensors": Part(weights), "optimizer.safetensors": Part(optimizer)}


def save_beside(training: Training, saver: Saver, step: int, step_s: float) -> tuple[float, float, int]:
    """(seconds the training thread waited, steps' time while saving over that of others, most bytes held)."""
    last = saver.last
    stall = timed(lambda: saver.save(step, training.parts(), {"validation": None}))
    times = []
    with Peak() as peak:
        while not times or saver.last is last:
            start = time.perf_counter()
            training.forward_backward()
            waited = timed(saver.staged)
            training.optimize()
            times.append(time.perf_counter() - start - waited)
            stall += waited
    outcome = saver.finish()
    assert outcome is not None, "nothing was saved"
    assert outcome.error is None, outcome.error
    return stall, statistics.median(times) / step_s, peak.bytes


def save_synchronously(parts: dict[str, Part]) -> None:
    path = CACHE / "synchronous.pt"
    torch.save({name: part.tensors for name, part in parts.items()}, path)
    with open(path, "rb") as f:
        os.fsync(f.fileno())
    path.unlink()


def timed(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def resident() -> int:
    """Bytes of anonymous memory of this process: page cache of the files written is not its own."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("no RssAnon: this bench needs Linux")


class Peak:
    """The most resident memory while it is entered, looked at every 5 ms."""

    def __enter__(self) -> Peak:
        self.bytes, self._done = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.bytes = max(self.bytes, resident())


if __name__ == "__main__":
    main()
