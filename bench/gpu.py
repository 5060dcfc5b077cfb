"""How fast this package is on one GPU: ceilings, training steps, a plain loop, the loader, whole volumes.

    python bench/gpu.py                  # under 8 minutes on one GPU
    python bench/gpu.py --tiny           # the same code in small, on a CPU: its figures mean nothing

Needs torch and the package's own dependencies. The most important parts run first; a part is skipped, and listed, if
its packages are missing, or if it would begin after `--budget` seconds. Rows go to stderr as they come; the last line
of stdout is JSON:

device, torch, cudnn    what ran where, and commit
matmul_tflops           (a) the measured ceiling, bf16; `ceilings` has the copy's and the convolutions'
mfu                     (b) by size: FLOPs of the best variant against that ceiling; `training` has every row
roofline                (b) by size: what the measured convolution and copy ceilings allow, over the eager step's time
vs_monai_loop           (c) a plain loop's time over ours, eager or compiled: its defaults, and bf16 autocast
data_wait               (d) share of a step that waits for the loader
denoise_vs_monai        (e) our voxels a second over MONAI's sliding window: its defaults, and the same type and memory
memory_error            (b) the planner's worst, over the measured peaks
ranks                   how far the weights of one NCCL rank, and of two gloo ranks, are from those of a process alone
skipped, failed         part: why; after a part that failed the others still run, and the exit code is 1
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # as it lies here, installed or not
from gpus.ceilings import ceilings  # noqa: E402

from ldct_dist.provenance import commit  # noqa: E402


class Bench:
    """Runs parts one after the other, and keeps what they say and why some say nothing."""

    def __init__(self, budget: float) -> None:
        self._end = time.monotonic() + budget
        self.skipped: dict[str, str] = {}
        self.failed: dict[str, str] = {}

    @property
    def late(self) -> bool:
        return time.monotonic() > self._end

    def part(self, name: str, act: Callable[[], Any]) -> Any:
        if self.late:
            self.skipped[name] = "out of time"
            return None
        start = time.monotonic()
        try:
            torch.compiler.reset()  # what the parts before had on the device goes
            gc.collect()
            torch.cuda.empty_cache()
            result = act()
        except ModuleNotFoundError as e:
            self.skipped[name] = f"package {e.name} is missing"
            return None
        except torch.OutOfMemoryError:
            self.skipped[name] = "does not fit"
            return None
        except Exception as e:  # noqa: BLE001 - minutes on a GPU went into the other parts
            traceback.print_exc()
            self.failed[name] = f"{type(e).__name__}: {e}".splitlines()[0]
            return None
        print(f"{name} ({time.monotonic() - start:.0f} s): {json.dumps(result)}", file=sys.stderr, flush=True)
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="on CPU, in small")
    parser.add_argument("--budget", type=float, default=400.0, help="seconds after which no part begins")
    parser.add_argument("--out", type=Path, help="folder to keep the JSON in, such as bench/results")
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available():
        sys.exit("no GPU here; --tiny proves the script on CPU")
    device = torch.device("cpu" if args.tiny else "cuda:0")
    if args.tiny:
        torch.set_num_threads(1)
        torch.compiler.set_stance("force_eager")  # compiling takes minutes, and is not what is proved here
    result = run(device, args.tiny, Bench(args.budget))
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        name = f"gpu-{result['device'].replace(' ', '-')}-{result['commit']}.json"
        (args.out / name).write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))
    sys.exit(1 if result["failed"] else 0)


def run(device: torch.device, tiny: bool, bench: Bench) -> dict[str, Any]:
    crop, crops, main_size = ((4, 16, 16), 2, "xs") if tiny else ((32, 128, 128), 2, "l")
    # As many crops a step as keep a GPU busy, which the smaller networks do not with few.
    sizes = (
        {"xs": crops} if tiny else {"l": crops, "xl": crops, "xxl": crops, "m": 4 * crops, "s": 16 * crops}
    )
    nafnet = {"nafnet3d-xs": crops} if tiny else {"nafnet3d-m": crops}
    shape = (6, 32, 32) if tiny else (300, 512, 512)
    # Asked now: after an error of CUDA's, it tells nothing.
    name = "CPU" if tiny else torch.cuda.get_device_name(device)
    peaks = bench.part("ceilings", lambda: ceilings(device, tiny))
    if peaks is None:
        sys.exit(f"bench/gpu.py: without ceilings nothing can be judged: {bench.failed or bench.skipped}")
    rows = _training(bench, ["eager"], sizes, crop, device, peaks)
    # Each part imports what it needs by itself, so that one missing package costs its parts alone.
    loop = bench.part("monai loop", lambda: _import("steps").monai_loop(main_size, crop, crops, device))
    denoising = bench.part(
        "denoising", lambda: _import("volumes").denoising("xs" if tiny else "m", shape, device, tiny)
    )
    steps = 2 if tiny else 60
    wait = bench.part(
        "loader", lambda: _import("volumes").data_wait("xs" if tiny else "m", crop, 4 * crops, device, steps)
    )
    ranks = bench.part("ranks", lambda: _import("ranks").differences(device))
    rows += _training(bench, ["cudnn benchmark"], {main_size: crops}, crop, device, peaks)
    rows += _training(bench, ["eager", "channels first"], nafnet, crop, device, peaks)
    others = ["full checkpointing", "selective checkpointing", "channels first", "compiled"]
    rows += _training(bench, others, sizes, crop, device, peaks)
    if denoising is not None and "skipped" in denoising:
        bench.skipped["denoising against MONAI"] = f"package {denoising['skipped']} is missing"
    ours = [r["step_s"] for r in rows if r["size"] == main_size and r["variant"] in ("eager", "compiled")]
    return {
        "device": name,
        "commit": commit() or "unknown",
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "matmul_tflops": peaks["matmul_flops"] / 1e12,
        "mfu": {size: max(r["mfu"] for r in rows if r["size"] == size) for size in (r["size"] for r in rows)},
        "roofline": {r["size"]: r["roofline"] for r in rows if r["variant"] == "eager"},
        "vs_monai_loop": {k: took / min(ours) for k, took in loop.items()} if loop and ours else None,
        "data_wait": wait,
        "denoise_vs_monai": denoising and {k: denoising.get(k) for k in ("defaults", "same")},
        "memory_error": max((abs(r["memory_error"]) for r in rows if "memory_error" in r), default=None),
        "ranks": ranks,
        "ceilings": peaks,
        "training": rows,
        "denoising": denoising,
        "skipped": bench.skipped,
        "failed": bench.failed,
    }


def _training(
    bench: Bench,
    variants: list[str],
    sizes: dict[str, int],
    crop: Any,
    device: torch.device,
    peaks: Any,
) -> list[dict]:
    rows: list[dict] = []
    for variant in variants:
        for size, crops in sizes.items():
            row = bench.part(
                f"{variant} {size}",
                lambda size=size, crops=crops, variant=variant: _import("steps").training(
                    size, variant, crop, crops, device, peaks
                ),
            )
            rows += [row] if row is not None else []
    return rows


def _import(name: str) -> Any:
    from importlib import import_module

    return import_module(f"gpus.{name}")


if __name__ == "__main__":
    main()
