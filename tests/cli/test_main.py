from __future__ import annotations

import sys

import pytest

from ldct_dist import cli
from ldct_dist.store import reader


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
