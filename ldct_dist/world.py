"""Which rank this process is, and the few ways in which ranks talk."""

from __future__ import annotations

import math
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist

from ldct_dist.errors import UserError
from ldct_dist.rendezvous import launched_as, meet, own_device

T = TypeVar("T")
_LEAVE_S = 5.0


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

        threads: for the arithmetic on the CPU; None: this rank's share of the cores that it may use, or one where a GPU
        does the arithmetic. works_on_cpu: the CPU does some of it even then.
        Raises UserError where the launcher does not say where to meet, and, on all ranks, where one of them has not the
        GPU that it should have; Unmet where some ranks do not come within minutes.
        """
        rank, size, local_rank, local_size = launched_as()
        device, fault = torch.device("cpu"), None
        try:
            device = own_device(local_rank, local_size)
        except UserError as e:
            if size == 1:
                raise
            fault = str(e)
        world = cls(rank, size, local_rank, local_size, device)
        if size > 1:
            world._connect(fault, timeout_s)
        world.refuse_uneven_gpus()
        if threads is None:
            threads = world.share_of_cores() if device.type == "cpu" or works_on_cpu else 1
        torch.set_num_threads(threads)
        return world

    def _connect(self, fault: str | None, timeout_s: float) -> None:
        """Form the process group. fault: what is wrong with this rank, which ends all of them."""
        store, told = meet(self.rank, self.size, fault, timeout_s)
        if told is not None:
            self.refuse(told)
        timeout, backend = timedelta(seconds=timeout_s), backend_of(self.device)
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=timeout)

    def leave(self) -> None:
        """Leave the process group, and wait until no other thread of this process is at work.

        gloo's threads live as long as anything refers to its groups, as DDP and DeepSpeed do to the end. If one of them
        still holds a tensor when the interpreter ends, the process aborts, and a run that is done counts as failed.
        """
        if not dist.is_initialized():
            return
        dist.destroy_process_group()
        end, rested = time.monotonic() + _LEAVE_S, 0
        while rested < 2 and time.monotonic() < end:
            time.sleep(0.01)  # frees the interpreter's lock for a thread that waits for it
            rested = 0 if _others_run() else rested + 1

    def __enter__(self) -> World:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Leave the others, unless this rank alone has failed: NCCL would first wait for them, and its error stay unseen."""
        if not failed_alone(kind):
            self.leave()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def name(self) -> str:
        return f"rank {self.rank} on {socket.gethostname()}"

    def group(self) -> dist.ProcessGroup | None:
        """A new gloo group for a background thread, whose collectives must not mix with the training thread's."""
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

    def on_main(self, act: Callable[[], T]) -> T:
        """Do `act` on rank 0 alone; its result on every rank. A UserError or OSError ends all ranks, as `refuse` says."""
        result, error = self.broadcast(self._outcome(act) if self.is_main else None)
        if error is not None:
            self.refuse(error)
        return result

    def on_each(self, act: Callable[[], T]) -> T:
        """Do `act` on every rank; on each its own result. A UserError or OSError on any ends all, as `refuse` says."""
        result, error = self._outcome(act)
        errors = [e for e in self.gather(error) if e is not None]
        if errors:
            self.refuse(errors[0])
        return cast(T, result)

    def _outcome(self, act: Callable[[], T]) -> tuple[T | None, str | None]:
        """(what `act` returned, None), or (None, its error in one line; an OSError's names this rank as well)."""
        try:
            return act(), None
        except UserError as e:
            return None, str(e)
        except OSError as e:
            return None, f"{self.name}: {e}"

    def refuse(self, message: str) -> NoReturn:
        """End all ranks over a user's mistake; all of them call it. Rank 0 alone prints the line."""
        if self.is_main:
            raise UserError(message)
        raise SystemExit(2)

    def share_of_cores(self) -> int:
        """How many cores are this rank's; at least one.

        A launcher may have given each rank cores of its own, or all ranks of a node the same ones: each core is shared
        out evenly over the ranks that may use it.
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
                f"ranks on {', '.join(without)} see no GPU, others do: check nvidia-smi there, or exclude that node"
            )
        for (host, theirs), sharing in ranks.items():
            if theirs is not None and len(sharing) > 1:
                self.refuse(
                    f"ranks {', '.join(map(str, sharing))} share one GPU ({host}, {theirs}): start as many ranks on a node "
                    "as it has GPUs (torchrun --nproc-per-node, srun --ntasks-per-node), and let each see its own or all"
                )

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of `tensor` over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def share(self, tensor: torch.Tensor, owner: int = 0) -> torch.Tensor:
        """The owner's `tensor`, in place."""
        if self.size > 1:
            dist.broadcast(tensor, src=owner)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether any rank's `flag` is true; the same on every rank."""
        return bool(self.sum(torch.tensor(float(flag))).item())


def failed_alone(kind: type[BaseException] | None) -> bool:
    """Whether a rank that ends with this exception ends alone. A user's mistake ends all of them."""
    return kind is not None and not issubclass(kind, (UserError, SystemExit))


def loss_of_a_rank(error: BaseException | None) -> str | None:
    """gloo's words for a broken connection, if `error` is one: gloo has no exception class of its own for it."""
    if isinstance(error, RuntimeError) and "gloo/transport" in str(error):
        return str(error).partition("] ")[2].partition(". ")[0]
    return None


def _others_run() -> bool:
    """Whether another thread of this process is running, or ready to run."""
    for task in Path("/proc/self/task").iterdir():
        try:
            state = (task / "stat").read_text().rpartition(") ")[2][0]
        except OSError:  # it has just ended
            continue
        if state in "RD" and int(task.name) != threading.get_native_id():
            return True
    return False


def backend_of(device: torch.device) -> str:
    """The process group's backend for ranks with such a device. Tensors on the CPU always travel by gloo."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
