"""docs/your_data.md has every setting of an ingest, with its default, and every column of a manifest."""

from __future__ import annotations

import re
from pathlib import Path

from ldct_dist.config import settings
from ldct_dist.store.ingest import IngestConfig
from ldct_dist.store.manifest import NEEDED, OPTIONAL

PAGE = (Path(__file__).parents[2] / "docs/your_data.md").read_text()


def test_each_setting_and_its_default():
    named = {}
    for names, default in re.findall(
        r"^\| (`[^|]+`) \|([^|]*)\|", PAGE.partition("## Settings")[2], re.MULTILINE
    ):
        named |= dict.fromkeys(re.findall(r"`([\w.]+)`", names), default.strip("` "))
    assert named.keys() == set(settings(IngestConfig))
    told = {name: float(value) for name, value in named.items() if re.fullmatch(r"[0-9.]+", value)}
    node = IngestConfig()
    for name, value in told.items():
        found = node
        for part in name.split("."):
            found = getattr(found, part)
        assert found == value, name
    assert len(told) > 8


def test_each_column_of_a_manifest():
    (header,) = re.findall(r"^case,.*$", PAGE, re.MULTILINE)
    assert tuple(header.split(",")) == NEEDED + OPTIONAL
