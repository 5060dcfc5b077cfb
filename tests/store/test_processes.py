"""What the server that workers are forked from may be: safe to fork, and soon there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import Executor, ThreadPoolExecutor

import pytest

from ldct_dist.store import processes, workers

SERVER = """
import importlib, json, os, sys
for module in sys.argv[1:]:
    importlib.import_module(module)
print(json.dumps({"threads": len(os.listdir("/proc/self/task")), "modules": list(sys.modules)}))
"""


def test_the_server_has_one_thread_and_imports_nothing_that_workers_do_without():
    run = [sys.executable, "-c", SERVER, *processes.PRELOAD]
    environment = {**os.environ, "OMP_NUM_THREADS": "4"}
    server = json.loads(subprocess.run(run, env=environment, capture_output=True, check=True).stdout)
    assert server["threads"] == 1
    assert not {"torch", "zarr", "pyarrow", "typer", "rich", "scipy"} & set(server["modules"])


@pytest.mark.parametrize("how", [KeyboardInterrupt, SystemExit])
def test_ctrl_c_and_term_do_not_wait_for_what_is_in_hand(tmp_path, own_server, how):
    with pytest.raises(how):
        ended(how, ["0", f"[__import__('time').sleep(20), open({str(tmp_path / 'done')!r}, 'w')]"])
    assert not (tmp_path / "done").exists()


def ended(how: type[BaseException], expressions: list[str]) -> None:
    with workers.Workers(2) as processes:
        for _ in processes.map(eval, expressions):
            raise how


def test_ctrl_c_while_the_server_starts_is_not_for_it(monkeypatch):
    """It would print a traceback of its imports."""
    seen = []
    ensure = lambda: seen.append(signal.getsignal(signal.SIGINT))  # noqa: E731
    monkeypatch.setattr(processes.forkserver, "ensure_running", ensure)
    before = signal.getsignal(signal.SIGINT)
    processes.start_server()
    assert seen == [signal.SIG_IGN]  # which a process that is started inherits
    assert signal.getsignal(signal.SIGINT) == before
    with ThreadPoolExecutor(1) as other:  # which may set no handler
        other.submit(processes.start_server).result()
    assert seen == [signal.SIG_IGN, before]


def test_no_more_processes_than_tasks(monkeypatch):
    sizes = []

    def pool(size: int) -> Executor:
        sizes.append(size)
        return ThreadPoolExecutor(size)

    monkeypatch.setattr(workers, "pool", pool)
    with workers.Workers(1000) as many:
        assert list(many.map(abs, [-1, -2])) == [1, 2]
        assert list(many.map(abs, [-1])) == [1]
        assert list(many.map(abs, [-1, -2, -3])) == [1, 2, 3]
        assert list(many.map(abs, [])) == []
    assert sizes == [2, 3]
