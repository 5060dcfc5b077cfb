"""Checks of the machines: the same software, a GPU a rank, clocks, and signals that arrive."""

from __future__ import annotations

import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import time
from importlib.metadata import version
from pathlib import Path

import torch

from ldct_dist.cluster.checks import Check, Probe, Verdict

MAX_SKEW_S = 1.0
ARRIVAL_S = 30.0  # slurmd on a busy node may be slow to pass a signal on


def look_software(_: Probe) -> dict[str, str]:
    facts = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "ldct_dist": version("ldct_dist"),
    }
    if torch.cuda.is_available():
        facts["GPU"] = torch.cuda.get_device_name()
        facts["driver"] = driver(Path("/proc/driver/nvidia/version"))
        facts["cuDNN"] = str(torch.backends.cudnn.version())
        facts["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return facts


def driver(version: Path) -> str:
    """The version of NVIDIA's driver, of its closed or its open kernel module, where the kernel tells it, or unknown: not
    all containers show the file, and torch runs on other makers' GPUs, too."""
    found = re.search(r"\d+\.\d+(\.\d+)?", version.read_text() if version.exists() else "")
    return found[0] if found else "unknown"


def judge_software(probe: Probe, seen: list[dict[str, str]]) -> Verdict:
    unlike = []
    for key in dict.fromkeys(k for facts in seen for k in facts):
        ranks_by_value: dict[str, list[int]] = {}
        for rank, facts in enumerate(seen):
            ranks_by_value.setdefault(facts.get(key, "none"), []).append(rank)
        if len(ranks_by_value) > 1:
            values = ", ".join(f"{v} on {probe.where(ranks)}" for v, ranks in ranks_by_value.items())
            unlike.append(f"{key} {values}")
    if unlike:
        return False, f"{'; '.join(unlike)}: load the same modules and environment on all nodes"
    return True, "alike: " + ", ".join(f"{k} {v}" for k, v in seen[0].items())


def look_gpu(probe: Probe) -> bool:
    """Whether this rank has a GPU. World.join has made sure that no other rank has the same one."""
    return probe.world.device.type == "cuda"


def judge_gpu(probe: Probe, seen: list[bool]) -> Verdict:
    return True, f"{len(seen)}, one a rank" if all(seen) else "none: training runs on the CPU"


def look_cores(probe: Probe) -> int:
    """How many cores are this rank's: see `World.share_of_cores`."""
    return probe.world.share_of_cores()


def judge_cores(probe: Probe, seen: list[int]) -> Verdict:
    fewest, needed = min(seen), probe.loader_threads + 1
    if fewest < needed and probe.world.device.type == "cuda":
        where = probe.where([rank for rank, cores in enumerate(seen) if cores == fewest])
        return False, (
            f"{fewest} a rank on {where}, for training and {probe.loader_threads} threads that load: the GPU will "
            f"wait for data; ask for at least --cpus-per-task={needed}"
        )
    return True, f"{fewest} a rank"


def look_clock(probe: Probe) -> list[float]:
    """This rank's clock at five moments that are nearly the same on all ranks."""
    moments = []
    for _ in range(5):
        probe.world.gather(None)
        moments.append(time.time())
    return moments


def judge_clock(probe: Probe, seen: list[list[float]]) -> Verdict:
    ahead = [statistics.median(a - b for a, b in zip(mine, seen[0], strict=True)) for mine in seen]
    worst = max(range(len(ahead)), key=lambda rank: abs(ahead[rank]))
    off = abs(ahead[worst])
    if off > MAX_SKEW_S:
        side = "ahead of" if ahead[worst] > 0 else "behind"
        return False, (
            f"{probe.hosts[worst]} is {off:.1f} s {side} {probe.hosts[0]}: have its clock synchronised (NTP, "
            "chrony); time limits and file dates go by it"
        )
    return True, f"all within {max(off, 0.001):.3f} s"


def look_signal(probe: Probe) -> bool | None:
    """Whether SIGUSR1 arrives if it is sent as Slurm sends it at the time limit.

    None where it cannot be sent, as in a container without Slurm's commands, which runs do not need.
    """
    if not probe.world.broadcast("SLURM_STEP_ID" not in os.environ or shutil.which("scancel") is not None):
        return None
    arrived: list[int] = []
    # The handler stays, for a signal that comes late.
    signal.signal(signal.SIGUSR1, lambda number, _: arrived.append(number))
    probe.world.gather(None)
    if probe.world.is_main:
        _signal_all()
    deadline = time.monotonic() + ARRIVAL_S
    while not arrived and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(arrived)


def judge_signal(probe: Probe, seen: list[bool | None]) -> Verdict:
    if None in seen:
        return True, "not tried: there is no scancel where the ranks run"
    deaf = [rank for rank, arrived in enumerate(seen) if not arrived]
    if deaf:
        return False, (
            f"SIGUSR1 did not reach rank {', '.join(map(str, deaf))} on {probe.where(deaf)}, so no checkpoint "
            "is saved at the time limit: a wrapper blocks it; start Python with exec, not as a shell's child"
        )
    return True, f"SIGUSR1 reached {'all ' if len(seen) > 1 else ''}{len(seen)} rank{'s' * (len(seen) > 1)}"


def _signal_all() -> None:
    """SIGUSR1 to every rank: through Slurm to the whole step, elsewhere to the group of processes."""
    if "SLURM_STEP_ID" not in os.environ:
        os.killpg(0, signal.SIGUSR1)
        return
    command = ["scancel", "--signal=USR1", f"{os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_STEP_ID']}"]
    # scancel signals one node after the other, and is itself a process of the step: it must ignore the signal.
    deaf = ["sh", "-c", 'trap "" USR1; exec "$@"', "sh", *command]
    done = subprocess.run(deaf, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")


CHECKS = [
    Check(look_software, {"versions": judge_software}),
    Check(look_gpu, {"GPUs": judge_gpu}),
    Check(look_cores, {"cores": judge_cores}),
    Check(look_clock, {"clocks": judge_clock}),
    Check(look_signal, {"signals": judge_signal}),
]
