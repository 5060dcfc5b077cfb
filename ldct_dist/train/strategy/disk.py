"""State on a disk of the node: a file mapped into memory, which the kernel reads as it is used and writes as it changes.

To all that computes with it, it is a tensor in memory, so DeepSpeed's step on the CPU, the average and checkpoints need
not know of it; but the memory behind it is the kernel's to take back. DeepSpeed's own swapping is not used: it knows
nothing of the average, swaps no state for a save that goes on beside training, and leaves its files behind.
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
"""elements that a step takes from a disk at a time, where DeepSpeed can do so"""
AHEAD = 8 * STRETCH
"""bytes of a tensor that are read ahead; those of all must have room in memory"""


class Disk:
    """Room for tensors in `folder`, all of it taken at once: what begins is not to fail later for want of room.

    The file has no name. It is gone with its process, however that ends, and no two processes meet in one.
    """

    def __init__(self, folder: Path, nbytes: int) -> None:
        try:
            # Asked for more than there is, some file systems take all of it before they notice, for all who write there.
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
        """A copy of it."""
        return self.empty_like(tensor).copy_(tensor.detach())

    def read_ahead(self, state: list[dict[str, torch.Tensor]]) -> None:
        """Have the kernel read it in large pieces, all at once, where it would read what is touched in small ones."""
        for tensor in (tensor for tensors in state for tensor in tensors.values()):
            start = tensor.data_ptr() - self._bytes.data_ptr()
            self._map.madvise(mmap.MADV_WILLNEED, start, min(tensor.nbytes, AHEAD))


def room_for(*tensors: torch.Tensor) -> int:
    """Bytes that these flat tensors take of a Disk: whole pages."""
    return sum(-(-t.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE for t in tensors)


def folder_on_this_node(nvme_path: str | None) -> Path:
    """Raises UserError unless it is a folder that one may write in; its variables are looked up here, on the node."""
    if nvme_path is None:
        raise UserError(
            "deepspeed: nvme needs nvme_path=FOLDER, on a disk of each node, such as $SLURM_TMPDIR"
        )
    folder = looked_up(nvme_path)
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(
            f"deepspeed.nvme_path={nvme_path} on {socket.gethostname()}: {folder} is no folder that one may write in"
        )
    return folder


def lies_in_memory(folder: Path) -> bool:
    """Whether what is written there takes the node's memory: a tmpfs, as /dev/shm is, and on some nodes /tmp."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return False
    device = folder.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    return any(line.split()[2] == number and " - tmpfs " in line for line in mounts)
