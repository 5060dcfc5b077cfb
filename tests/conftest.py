"""What several test modules share. tests/ itself is importable: `from synthetic_dicom import write_series`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Before anything imports torch, and for every process a test starts: workers that each take all cores wait
# for each other most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Under --dist loadfile, all tests of the real Slurm go to one worker: one cluster is enough for a machine."""
    from xdist.scheduler import LoadFileScheduling

    class OneCluster(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "slurm" if nodeid.startswith("tests/cluster/slurm/") else super()._split_scope(nodeid)

    return OneCluster(config, log) if config.getoption("dist") == "loadfile" else None
