"""What several test modules share. tests/ itself is importable: `from synthetic_dicom import write_series`."""

from __future__ import annotations

import sys
from pathlib import Path

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
