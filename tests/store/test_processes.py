"""What the server that workers are forked from may be: safe to fork, and soon there."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from ldct_dist.store import processes

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
