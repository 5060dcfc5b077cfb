"""The network and the loss of docs/your_own.md, installed as its readers would have it."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest

from ldct_dist.models.installed import origin

DOCS = Path(__file__).parents[1] / "docs" / "your_own.md"
NAME = "dncnn3d"


@pytest.fixture
def my_nets(tmp_path, monkeypatch) -> Path:
    """The module, in a folder where Python finds it and its entry point, in this process and those it starts."""
    blocks = dict(re.findall(r"```(\w+)\n(.*?)```", DOCS.read_text(), re.DOTALL))
    return install(tmp_path / "site", monkeypatch, blocks["python"], blocks["toml"])


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, source: str, project: str) -> Path:
    """What pip leaves of a package with one module, `my_nets`."""
    described = tomllib.loads(project)["project"]
    facts = folder / f"{described['name'].replace('-', '_')}-{described['version']}.dist-info"
    facts.mkdir(parents=True)
    (folder / "my_nets.py").write_text(source)
    (facts / "METADATA").write_text(f"Name: {described['name']}\nVersion: {described['version']}\n")
    points = [
        f"[{group}]\n" + "".join(f"{name} = {place}\n" for name, place in own.items())
        for group, own in described["entry-points"].items()
    ]
    (facts / "entry_points.txt").write_text("\n".join(points))
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.delitem(sys.modules, "my_nets", raising=False)
    origin.cache_clear()
    return folder / "my_nets.py"
