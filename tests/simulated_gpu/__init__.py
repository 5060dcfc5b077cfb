"""A GPU for machines without one: its tensors say cuda:0, the CPU computes them, and mistakes are found.

What an operation on it raises, in a process that called `start`:
- an operation on tensors of both sides (0-d tensors of the CPU aside, as on a GPU);
- a tensor made on one stream and used on another that has not waited for it, or that its memory does not know of
  (`Tensor.record_stream`);
- an asynchronous copy from memory that is not pinned.
`torch.cuda.set_sync_debug_mode("warn")` tells of the operations that the CPU waits for.
An asynchronous copy to the CPU arrives when its event is waited for, not before. `torch.cuda.max_memory_allocated` is
the bytes of the tensors that were there at once.

It says nothing of speed, rounding or what cuDNN takes to work in: every number is the CPU's. Not simulated: CUDA
generators, NCCL, DDP's own timers, the compiler.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

HERE = Path(__file__).parent


def unavailable() -> str | None:
    """Why it cannot be started here."""
    import torch

    if torch.version.cuda or torch.version.hip:
        return "a torch built for GPUs, and no GPU"
    if sys.platform != "linux" or not shutil.which("g++"):
        return "no Linux and g++ to make a simulated GPU with"
    return None


@cache
def built() -> Path:
    """The part that is C++, compiled once a process; seconds."""
    torch = Path(importlib.util.find_spec("torch").origin).parent
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    library = Path(folder) / "device.so"
    flags = ["-std=c++20", "-O0", "-shared", "-fPIC", f"-I{torch}/include"]
    libraries = [f"-L{torch}/lib", f"-Wl,-rpath,{torch}/lib", "-lc10", "-ltorch_cpu"]
    subprocess.run(["g++", *flags, HERE / "device.cpp", "-o", library, *libraries], check=True)
    return library


def start(library: Path, values: bool = True) -> None:
    """From here on this process has a GPU; torch must not be imported yet.

    Without values nothing is computed: a network of any size takes a step in seconds, and memory is all it tells of.
    """
    ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
    from simulated_gpu import api

    api.install(values)
