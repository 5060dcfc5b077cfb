from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ldct_dist import cli
from ldct_dist.evaluate.protocols import PROTOCOLS
from ldct_dist.store import reader

CONFIGS = Path(__file__).parents[2] / "configs"


def test_ctrl_c_is_one_line_and_130(tmp_path, monkeypatch, capsys):
    def interrupt(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(reader, "Store", interrupt)
    monkeypatch.setattr(sys, "argv", ["ldct-dist", "info", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "the same command again goes on" in lines[0]


def test_evaluate_names_its_protocols_and_says_that_the_store_comes_last(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ldct-dist", "evaluate", "--help"])
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit):
        cli.main()
    said = capsys.readouterr().out
    assert [name for name in PROTOCOLS if not name.endswith("-3d") and name not in said] == []
    monkeypatch.setattr(sys, "argv", ["ldct-dist", "evaluate", "runs/mayo"])
    with pytest.raises(SystemExit):
        cli.main()
    assert (
        "runs/mayo: not a store (no zarr.json that may be read); evaluate takes weights and, last, a store"
        in capsys.readouterr().err
    )


def test_help_breaks_no_line_where_the_source_does(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ldct-dist", "train", "--help"])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        cli.main()
    assert "stop it with a checkpoint; a second INT stops it at once." in capsys.readouterr().out


def test_the_demo_takes_an_override_without_its_config(monkeypatch, capsys):
    monkeypatch.chdir(CONFIGS.parent)
    monkeypatch.setattr(sys, "argv", ["ldct-dist", "demo", "stepps=7"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "stepps: no such setting; did you mean steps?" in capsys.readouterr().err
