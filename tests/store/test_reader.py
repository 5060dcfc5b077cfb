from __future__ import annotations

import subprocess
import sys

from stores import make_store

PROGRAM = """
import os, sys
from ldct_dist.store.reader import Store
before = os.listdir("/proc/self/task")
store = Store(sys.argv[1])
assert len(store.cases) == 2
assert os.listdir("/proc/self/task") == before
"""


def test_opening_leaves_no_thread_behind(tmp_path):
    """pyarrow's abort a process that ends soon after it has read, as one that refuses a config does: a quarter did."""
    path = make_store(tmp_path / "ct.zarr", [(10, 40, 40), (8, 32, 40)], ["train", "val"]).path
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, path], check=False, timeout=60, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
