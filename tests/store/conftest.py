from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver

import pytest

from ldct_dist.store import workers


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
