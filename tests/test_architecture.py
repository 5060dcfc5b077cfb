"""The design's one rule that no tool checks: imports go one way."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import ldct_dist

ORDER = [
    *("errors", "files", "provenance", "config", "rendezvous", "world", "ct", "store", "data", "models"),
    *("checkpoint", "denoise", "evaluate", "train", "cluster", "demo", "cli"),
]
ROOT = Path(ldct_dist.__file__).parent


def imported(tree: ast.AST) -> set[str]:
    """First part below ldct_dist of every module that the code imports."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ldct_dist."):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.ImportFrom) and node.module == "ldct_dist":
            names.update(alias.name for alias in node.names)
    return names


def test_a_module_imports_only_from_those_before_it():
    seen = set()
    for path in ROOT.rglob("*.py"):
        home = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if home.startswith("__"):
            continue
        seen.add(home)
        for name in imported(ast.parse(path.read_text())):
            assert ORDER.index(name) <= ORDER.index(home), f"{path} imports ldct_dist.{name}"
    assert seen == set(ORDER)


def test_public_names_are_there():
    assert all(getattr(ldct_dist, name) is not None for name in ldct_dist.__all__)


def test_a_folder_of_the_packages_name_does_not_hide_it(tmp_path):
    """The folder that holds a clone is such a place."""
    (tmp_path / "ldct_dist").mkdir()
    subprocess.run([sys.executable, "-c", "from ldct_dist import UserError"], cwd=tmp_path, check=True)
