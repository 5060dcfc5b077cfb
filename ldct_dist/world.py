"""Which rank this process is, and the few ways in which ranks talk."""

from __future__ import annotations

import math
import os
import resource
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist

from ldct_dist.errors import UserError

T = TypeVar("T")
NAMED = 4
"""of many, those that a line names"""
_LEAVE_S = 5.0
_MEET_S = 600.0  # many ranks that import from one file system take minutes


class Unmet(UserError):
    """Not all ranks came."""


@dataclass(frozen=True)
class World:
    """This process among its peers: started alone, by torchrun, or by srun (one task a rank)."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def join(cls, threads: int | None = None, timeout_s: float = 1800.0, works_on_cpu: bool = False) -> World:
        """Read the launcher's variables, set the device and the threads, and meet the other ranks.

        threads: for the arithmetic on CPU; None: the rank's share of the cores that it may use, but one where the
        arithmetic is a GPU's. works_on_cpu: some of it is the CPU's all the same.
        Raises UserError when the launcher promised a rank but not where to meet; on all ranks, when one of them has not
        the GPU that it should have; Unmet when some do not come within minutes.
        """
        rank, size, local_rank, local_size = _launcher()
        device, fault = torch.device("cpu"), None
        try:
            device = _device(local_rank, local_size)
        except UserError as e:
            if size == 1:
                raise
            fault = str(e)
        if size > 1:
            missing = [v for v in ("MASTER_ADDR", "MASTER_PORT") if v not in os.environ]
            if missing:
                raise UserError(
                    f"{size} ranks were started without {' and '.join(missing)}: export them in the job "
                    "script (see slurm/train.sbatch), or start with torchrun"
                )
            # Connections are files, and a rank has two to each of the others, rank 0 three: the usual 1024 end at 340 ranks.
            _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
            store, timeout = _meet(rank, size, fault, timeout_s), timedelta(seconds=timeout_s)
            dist.init_process_group(
                backend_of(device), store=store, rank=rank, world_size=size, timeout=timeout
            )
        world = cls(rank, size, local_rank, local_size, device)
        world.refuse_uneven_gpus()
        if threads is None:
            threads = world.share_of_cores() if device.type == "cpu" or works_on_cpu else 1
        torch.set_num_threads(threads)
        return world

    def leave(self) -> None:
        """Part from the other ranks, and wait until this process' other threads rest.

        gloo's threads live on as long as anything refers to its groups, as DDP and DeepSpeed do to the end. One that has
        yet to let go of a tensor when the interpreter ends aborts the process, and makes a failure of a run that is done.
        """
        if not dist.is_initialized():
            return
        dist.destroy_process_group()
        end, rested = time.monotonic() + _LEAVE_S, 0
        while rested < 2 and time.monotonic() < end:
            time.sleep(0.01)  # which frees the interpreter's lock, for a thread that waits for it
            rested = 0 if _others_run() else rested + 1

    def __enter__(self) -> World:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Leave, unless this rank alone has failed: NCCL would wait for the others first, and nobody would learn why."""
        if not failed_alone(kind):
            self.leave()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def name(self) -> str:
        return f"rank {self.rank} on {socket.gethostname()}"

    def group(self) -> dist.ProcessGroup | None:
        """A gloo group of its own, so that a background thread's collectives never meet the trainer's."""
        return dist.new_group(backend="gloo") if self.size > 1 else None

    def gather(self, item: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
        """`item` of every rank, in rank order, on every rank."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item, group=group)
        return items

    def broadcast(self, item: Any, owner: int = 0) -> Any:
        """The owner's `item` on every rank."""
        if self.size == 1:
            return item
        box = [item]
        dist.broadcast_object_list(box, src=owner)
        return box[0]

    def agree(self, act: Callable[[], T]) -> T:
        """`act` on rank 0 alone; its result on every rank. After a UserError or OSError all end, as `refuse` says."""
        result, error = self.broadcast(self._outcome(act) if self.is_main else None)
        if error is not None:
            self.refuse(error)
        return result

    def each(self, act: Callable[[], T]) -> T:
        """`act` on every rank, its own result on each. After a UserError or OSError on any all end, as `refuse` says."""
        result, error = self._outcome(act)
        errors = [e for e in self.gather(error) if e is not None]
        if errors:
            self.refuse(errors[0])
        return cast(T, result)

    def _outcome(self, act: Callable[[], T]) -> tuple[T | None, str | None]:
        """What `act` returned, or what is to be said of its failure: of a disk's, also where it is."""
        try:
            return act(), None
        except UserError as e:
            return None, str(e)
        except OSError as e:
            return None, f"{self.name}: {e}"

    def refuse(self, message: str) -> NoReturn:
        """End all ranks over a user's mistake that all of them know of: the first says it, in one line."""
        if self.is_main:
            raise UserError(message)
        raise SystemExit(2)

    def share_of_cores(self) -> int:
        """Of the cores that this rank may use, its part of those that other ranks may use too; at least one.

        A launcher may have given each rank cores of its own, or all ranks of a node the same.
        """
        cores = {(socket.gethostname(), core) for core in os.sched_getaffinity(0)}
        users = Counter(core for theirs in self.gather(cores) for core in theirs)
        return max(1, math.floor(sum(Fraction(1, users[core]) for core in cores)))

    def refuse_uneven_gpus(self) -> None:
        """End all ranks if some have a GPU and others none, or if two have the same one, which NCCL cannot do."""
        gpu = torch.cuda.get_device_properties(self.device).uuid if self.device.type == "cuda" else None
        ranks: dict[tuple[str, str | None], list[int]] = {}
        for rank, theirs in enumerate(self.gather((socket.gethostname(), gpu and str(gpu)))):
            ranks.setdefault(theirs, []).append(rank)
        without = [host for host, gpu in ranks if gpu is None]
        if 0 < len(without) < len(ranks):
            self.refuse(
                f"ranks on {', '.join(without)} see no GPU, others do: see nvidia-smi there, or leave it out"
            )
        for (host, theirs), sharing in ranks.items():
            if theirs is not None and len(sharing) > 1:
                self.refuse(
                    f"ranks {', '.join(map(str, sharing))} share one GPU ({host}, {theirs}): start as many ranks on a node "
                    "as it has GPUs (torchrun --nproc-per-node, srun --ntasks-per-node), and let each see its own or all"
                )

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` added over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether any rank's `flag` is up, on every rank."""
        return bool(self.sum(torch.tensor(float(flag))).item())


def failed_alone(kind: type[BaseException] | None) -> bool:
    """Whether a rank that ends so is the only one: of mistakes, all know."""
    return kind is not None and not issubclass(kind, (UserError, SystemExit))


def loss_of_a_rank(error: BaseException | None) -> str | None:
    """What gloo says of the other end of a connection, if that broke: it has no class of errors for it."""
    if isinstance(error, RuntimeError) and "gloo/transport" in str(error):
        return str(error).partition("] ")[2].partition(". ")[0]
    return None


def few(told: Sequence[str], between: str = "; ") -> str:
    """What each of so many tells, in one line: the first of them, and how many more. A full disk is met by all ranks."""
    rest = len(told) - NAMED
    return between.join((*told[:NAMED], *([f"and {rest} more"] if rest > 0 else [])))


def _others_run() -> bool:
    """Whether another thread of this process runs, or would if a core were free."""
    for task in Path("/proc/self/task").iterdir():
        try:
            state = (task / "stat").read_text().rpartition(") ")[2][0]
        except OSError:  # it has just ended
            continue
        if state in "RD" and int(task.name) != threading.get_native_id():
            return True
    return False


def backend_of(device: torch.device) -> str:
    """What ranks with such a device talk by; what lies in the CPU's memory goes by gloo in any case."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def _meet(rank: int, size: int, fault: str | None, timeout_s: float) -> dist.Store:
    """Where the ranks exchange keys, once all are there. A rank that ended before, with a `fault` of its own, would be
    waited for by the others, and hold their nodes."""
    meeting_s = min(timeout_s, _MEET_S)
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
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
            f"{socket.gethostname()} did not meet the other ranks at {address} within {meeting_s:g} s: did one of them "
            "not start? Is the interface the right one (GLOO_SOCKET_IFNAME), and its ports open? "
            f"({str(e).splitlines()[0]})"
        ) from e
    if told is not None:
        World(rank, size).refuse(told)
    store.set_timeout(timedelta(seconds=timeout_s))
    return store


def _launcher() -> tuple[int, int, int, int]:
    """rank, world size, local rank, ranks on this node."""
    e = os.environ
    if "RANK" in e and "WORLD_SIZE" in e:
        local = int(e.get("LOCAL_RANK", 0)), int(e.get("LOCAL_WORLD_SIZE", 1))
        return int(e["RANK"]), int(e["WORLD_SIZE"]), *local
    # SLURM_PROCID is also set in the batch step itself, where nobody else is to be met.
    if "SLURM_PROCID" in e and "SLURM_STEP_ID" in e and int(e.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        per_node = e.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0].split(",")[0]
        return int(e["SLURM_PROCID"]), int(e["SLURM_STEP_NUM_TASKS"]), int(e["SLURM_LOCALID"]), int(per_node)
    return 0, 1, 0, 1


def _device(local_rank: int, local_size: int) -> torch.device:
    """This rank's own. Raises UserError unless there is one GPU a rank, where Slurm gave GPUs to the job."""
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
