from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from ldct_dist.store import workers


@pytest.fixture
def threads(monkeypatch):
    """Ingest in threads: what it does is the same, without the seconds that processes take to start."""
    monkeypatch.setattr(workers, "pool", ThreadPoolExecutor)
