from __future__ import annotations

import sys

import pytest

from ldct_dist import cli
from sources import QUICK, write_patients


def test_paths_are_printed_as_they_are(tmp_path, monkeypatch, capsys):
    """Words in brackets are a style to the console, unless it is told otherwise."""
    store = tmp_path / "[test]" / "ct.zarr"
    quick = [f"simulation.{key}={value}" for key, value in QUICK.model_dump(exclude_defaults=True).items()]
    source = write_patients(tmp_path / "in", 1)
    for words in (["ingest", source, store, "workers=1", *quick], ["finalise", store], ["verify", store]):
        monkeypatch.setattr(sys, "argv", ["ldct-dist", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        assert str(store) in capsys.readouterr().out


def test_what_may_not_be_looked_at_cannot_be_verified(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ldct-dist", "verify", str(tmp_path / ("n" * 300))])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "nor a weights file that may be read" in capsys.readouterr().err
