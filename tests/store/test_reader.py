from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace

import pytest

from ldct_dist.errors import UserError
from ldct_dist.store import layout
from ldct_dist.store.catalogue import parquet
from ldct_dist.store.reader import Store
from ldct_dist.store.record import read_record, sha256
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


@pytest.mark.parametrize("name", ["/home/reader/work", "..", "../../work", "case-000/1.00", "case\n", ""])
def test_a_store_whose_names_lead_elsewhere_is_refused(tmp_path, name):
    """With data.stage, a store from somewhere else had any folder of the reader's deleted, as a damaged copy."""
    path = make_store(tmp_path / "ct.zarr", [(8, 32, 40)]).path
    record = read_record(path / "cases" / "case-000")
    for changed in (replace(record, name=name), replace(record, doses=(name, "0.25"))):
        catalogue = parquet([changed])
        (path / layout.CATALOGUE).write_bytes(catalogue)
        (path / "zarr.json").write_bytes(layout.root_metadata(sha256(catalogue)))
        with pytest.raises(UserError, match=f"{re.escape(repr(name))}, a name that no ingest gives"):
            Store(path)
