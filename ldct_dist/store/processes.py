"""The processes of an ingest: forked from a server that has imported once what they all need.

Not from the process that ingests: it may have threads (torch's) that a forked child would wait for for ever.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import forkserver

PRELOAD = ["ldct_dist.store.single_thread", "ldct_dist.store.task", __name__]  # in this order
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


def start_server() -> None:
    """Start the server, if it does not run yet; its imports then go on beside the caller's own.

    It is the one that multiprocessing keeps for a process, and ends with that, however it ends.
    """
    forkserver.set_forkserver_preload(PRELOAD)
    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        forkserver.ensure_running()
        return
    # Ctrl-C is not for the server, which learns that only after imports and would end them with a traceback.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, handler)


def pool(workers: int) -> Executor:
    start_server()
    context = multiprocessing.get_context("forkserver")
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare)
    # All start with the first task, as those that are forked do: one that starts while another is killed would be
    # waited for without end.
    executor._safe_to_dynamically_spawn_children = False  # type: ignore[attr-defined]
    return executor


def kill(executor: Executor) -> None:
    """End what the processes of a `pool` do, at once: what they write is made to be killed at any instant."""
    for process in list((getattr(executor, "_processes", None) or {}).values()):
        process.kill()


def _prepare() -> None:
    from numcodecs import blosc

    from ldct_dist.store import single_thread  # noqa: F401  where the server is another's, it is not loaded yet

    if "torch" in sys.modules:  # the calling script imports it
        sys.modules["torch"].set_num_threads(1)
    blosc.use_threads = False
    _keep_memory()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _keep_memory() -> None:
    """Volumes of one case after the other lie in the same memory: to take it anew each time, from glibc's default of
    giving back what is large, costs a tenth of the work."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def _end_with_parent() -> None:
    """A parent that was killed cannot end its pool, and a worker that lives on would write into the store
    beside those of the next start."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
