"""How a process finds the other ranks: what its launcher says of it, which device is its own, and where all meet."""

from __future__ import annotations

import os
import resource
import socket
from datetime import timedelta

import torch
import torch.distributed as dist

from ldct_dist.errors import UserError

_MEET_S = 600.0  # many ranks that import from one file system take minutes


class Unmet(UserError):
    """Not all ranks came."""


def launched_as() -> tuple[int, int, int, int]:
    """(rank, world size, local rank, ranks on this node), from the variables of torchrun or srun."""
    e = os.environ
    if "RANK" in e and "WORLD_SIZE" in e:
        local = int(e.get("LOCAL_RANK", 0)), int(e.get("LOCAL_WORLD_SIZE", 1))
        return int(e["RANK"]), int(e["WORLD_SIZE"]), *local
    # SLURM_PROCID is also set in the batch step itself, where there are no other ranks to meet.
    if "SLURM_PROCID" in e and "SLURM_STEP_ID" in e and int(e.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        per_node = e.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0].split(",")[0]
        return int(e["SLURM_PROCID"]), int(e["SLURM_STEP_NUM_TASKS"]), int(e["SLURM_LOCALID"]), int(per_node)
    return 0, 1, 0, 1


def own_device(local_rank: int, local_size: int) -> torch.device:
    """The GPU of this rank, or the CPU where there is none.

    Raises UserError where Slurm gave GPUs to the job, but not one to each rank.
    """
    visible = torch.cuda.device_count() if torch.cuda.is_available() else 0
    given = int(os.environ.get("SLURM_GPUS_ON_NODE") or 0) if "SLURM_STEP_ID" in os.environ else 0
    # A site's Slurm shows a task either all GPUs of the node or its own alone, as device 0.
    if given and (given != local_size or visible not in (1, given)):
        raise UserError(
            f"{local_size} ranks on {socket.gethostname()}, {given} GPUs there from Slurm, {visible} seen by "
            f"each: start one task per GPU (--gpus-per-node = --ntasks-per-node)"
            + ("" if visible else "; none at all means torch without CUDA, or a node without driver")
        )
    if not visible:
        return torch.device("cpu")
    index = 0 if visible == 1 else local_rank
    if index >= visible:
        raise UserError(
            f"local rank {local_rank} on {socket.gethostname()} sees {visible} GPUs: "
            "start one task per GPU (--gpus-per-node = --ntasks-per-node)"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def meet(rank: int, size: int, fault: str | None, timeout_s: float) -> tuple[dist.Store, str | None]:
    """Wait until all ranks are there; the store through which they form groups, and a fault that one of them has.

    fault: why this rank cannot take part, or None. It has to come all the same: the others would wait for it, and hold
    their nodes. timeout_s: of the store from then on. Raises UserError where the launcher does not say where to meet,
    and Unmet where some do not come within minutes.
    """
    missing = [v for v in ("MASTER_ADDR", "MASTER_PORT") if v not in os.environ]
    if missing:
        raise UserError(
            f"{size} ranks were started without {' and '.join(missing)}: export them in the job "
            "script (see slurm/train.sbatch), or start with torchrun"
        )
    _allow_open_files()
    meeting_s = min(timeout_s, _MEET_S)
    try:
        url = f"env://?rank={rank}&world_size={size}"
        store, _, _ = next(dist.rendezvous(url, timeout=timedelta(seconds=meeting_s)))
        if fault is not None:
            store.set("ldct/fault", fault)
        if store.add("ldct/here", 1) == size:
            store.set("ldct/all", "")
        store.wait(["ldct/all"])
        told = store.get("ldct/fault").decode() if store.check(["ldct/fault"]) else None
        if store.add("ldct/told", 1) == size:
            store.set("ldct/over", "")
        if rank == 0:  # the keys lie in its process
            store.wait(["ldct/over"])
    except (dist.DistError, RuntimeError) as e:
        raise Unmet(
            f"{socket.gethostname()} did not meet the other ranks at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']} within {meeting_s:g} s: did one of them not start? Is the interface the right "
            f"one (GLOO_SOCKET_IFNAME), and its ports open? ({str(e).splitlines()[0]})"
        ) from e
    store.set_timeout(timedelta(seconds=timeout_s))
    return store, told


def _allow_open_files() -> None:
    """Raise this process' limit on open files as far as the system allows.

    Connections count as files, and a rank has two to each of the others, rank 0 three: the usual 1024 suffice for 340.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
