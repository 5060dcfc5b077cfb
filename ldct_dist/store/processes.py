"""The processes of an ingest, forked from a server that has imported what all of them need.

They are not forked from the process that ingests: that may have threads, torch's say, for which a forked child would wait
for ever.
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
    """Start the server, unless it runs already. Its imports then go on beside the caller's own.

    It is multiprocessing's fork server of this process, and ends with the process, however that ends.
    """
    forkserver.set_forkserver_preload(PRELOAD)
    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        forkserver.ensure_running()
        return
    # The server is to ignore Ctrl-C, but only does so after its imports, which would end in a traceback.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, handler)


def pool(workers: int) -> Executor:
    start_server()
    context = multiprocessing.get_context("forkserver")
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare)
    # All start with the first task, as in a pool that forks: otherwise, one that starts while another is killed would be
    # waited for without end.
    executor._safe_to_dynamically_spawn_children = False  # type: ignore[attr-defined]
    return executor


def kill(executor: Executor) -> None:
    """Kill the processes of a `pool` at once, which is safe at any time: no case is half written."""
    for process in list((getattr(executor, "_processes", None) or {}).values()):
        process.kill()


def _prepare() -> None:
    from numcodecs import blosc

    from ldct_dist.store import single_thread  # noqa: F401  not loaded yet if somebody else started the server

    if "torch" in sys.modules:  # the calling script imports it
        sys.modules["torch"].set_num_threads(1)
    blosc.use_threads = False
    _keep_memory()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _keep_memory() -> None:
    """Have glibc reuse the memory of one case for the next. By default it returns large blocks to the system, and
    allocating them again takes a tenth of the time."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def _end_with_parent() -> None:
    """Wait for the parent's end, and end this process. A parent that is killed cannot end its pool, and the workers would
    go on writing into the store beside those of the next start."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
