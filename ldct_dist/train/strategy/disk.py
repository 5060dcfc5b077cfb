"""State on a disk of the node: a file mapped into memory, which the kernel reads when it is used and writes back.

Whoever computes with it sees a tensor in memory, so DeepSpeed's step on the CPU, the average and checkpoints need not
know of the disk; but the kernel may take the memory back at any time. DeepSpeed's own swapping is not used: it does not
know of the average, cannot hand its state to a save beside training, and leaves its files behind.
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import socket
import tempfile
from pathlib import Path

import torch

from ldct_dist.config import looked_up
from ldct_dist.errors import UserError
from ldct_dist.files import size

STRETCH = 10_000_000
"""elements that a step reads from the disk at a time, where DeepSpeed supports it (ZeRO 3)"""
AHEAD = 8 * STRETCH
"""bytes of each tensor that are read ahead, at most; there must be room in memory for those of all tensors"""


class Disk:
    """Room for tensors in `folder`. All of it is allocated at once, so that a run does not fail later for lack of room.

    The file has no name: it is gone when the process ends, however that ends, and no two processes share one.
    Raises UserError where there is no room.
    """

    def __init__(self, folder: Path, nbytes: int) -> None:
        try:
            # Asked for more than is free, some file systems allocate all of that before they fail, and meanwhile
            # everybody else's writes fail, too.
            if nbytes > shutil.disk_usage(folder).free:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
                os.posix_fallocate(file.fileno(), 0, nbytes)
                self._map = mmap.mmap(file.fileno(), nbytes)
                self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        except OSError as e:
            raise UserError(
                f"deepspeed.nvme_path={folder} on {socket.gethostname()}: {e.strerror}; each rank there takes "
                f"{size(nbytes)}: make room, or name a folder on another disk of the node"
            ) from e
        self._taken = 0

    def empty_like(self, tensor: torch.Tensor) -> torch.Tensor:
        start, self._taken = self._taken, self._taken + room_for(tensor)
        return self._bytes[start : start + tensor.nbytes].view(tensor.dtype)

    def moved(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of `tensor` on the disk."""
        return self.empty_like(tensor).copy_(tensor.detach())

    def read_ahead(self, state: list[dict[str, torch.Tensor]]) -> None:
        """Have the kernel read the tensors in large pieces ahead of their use, and not page by page as they are touched."""
        for tensor in (tensor for tensors in state for tensor in tensors.values()):
            start = tensor.data_ptr() - self._bytes.data_ptr()
            self._map.madvise(mmap.MADV_WILLNEED, start, min(tensor.nbytes, AHEAD))


def room_for(*tensors: torch.Tensor) -> int:
    """Bytes that these flat tensors take of a Disk: whole pages."""
    return sum(-(-t.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE for t in tensors)


def folder_on_this_node(nvme_path: str | None) -> Path:
    """The folder, with ~ and variables expanded here, on the node. Raises UserError unless it can be written to."""
    if nvme_path is None:
        raise UserError(
            "deepspeed: nvme needs nvme_path=FOLDER, on a disk of each node, such as $SLURM_TMPDIR"
        )
    folder = looked_up(nvme_path)
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(
            f"deepspeed.nvme_path={nvme_path} on {socket.gethostname()}: {folder} is not a folder you may write to"
        )
    return folder


def lies_in_memory(folder: Path) -> bool:
    """Whether the folder is on a tmpfs, which takes the node's memory: /dev/shm is, and on some nodes /tmp."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return False
    device = folder.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    return any(line.split()[2] == number and " - tmpfs " in line for line in mounts)
