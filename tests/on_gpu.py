"""Checks that need a GPU: on the one that is here, or on a simulated one. In a process of their own either way."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

import simulated_gpu

HERE = Path(__file__).parent


def on_gpu(check: Callable[..., None], *args: str | Path, values: bool = True) -> None:
    """Call a test module's function, which finds a GPU as cuda:0, with these strings and paths as strings.

    values: whether a simulated one is to compute them. A failure there is one here. Skips where there is neither a GPU
    nor what simulates one.
    """
    if not _is_here() and (why := simulated_gpu.unavailable()):
        pytest.skip(why)
    library = "" if _is_here() else str(simulated_gpu.built())
    call = json.dumps(
        [library, values, sys.modules[check.__module__].__file__, check.__name__, *map(str, args)]
    )
    ended = _run(__file__, call)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@cache
def _is_here() -> bool:
    import torch  # not above: a simulated GPU has to be there before it

    return (
        torch.version.cuda is not None
        and "True" in _run("-c", "import torch; print(torch.cuda.is_available())").stdout
    )


def _run(*arguments: str) -> subprocess.CompletedProcess:
    """This Python, with the GPUs that `conftest` hides."""
    env = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    if (gpus := os.environ["GPUS_OF_THIS_MACHINE"]) != "all":
        env["CUDA_VISIBLE_DEVICES"] = gpus
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=HERE,
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def _main(library: str, values: bool, module: str, name: str, *args: str) -> None:
    if library:
        simulated_gpu.start(Path(library), values)
    sys.path.insert(0, str(Path(module).parent))
    getattr(importlib.import_module(Path(module).stem), name)(*args)


if __name__ == "__main__":
    _main(*json.loads(sys.argv[1]))
