from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver

import pytest

from ldct_dist.store import workers
from sources import write_patients


@pytest.fixture
def source(tmp_path):
    return write_patients(tmp_path / "in", 3)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "ct.zarr"


@pytest.fixture
def threads(monkeypatch):
    """Ingest in threads: what it does is the same, without the seconds that processes take to start."""
    monkeypatch.setattr(workers, "pool", ThreadPoolExecutor)


@pytest.fixture
def own_server() -> Iterator[None]:
    """A fork server for this test: the one that tests of training keep in this process has imported other things."""
    forkserver._forkserver._stop()
    yield
    forkserver._forkserver._stop()
