from __future__ import annotations

import os
import re
import signal
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from ldct_dist import __main__, cli
from ldct_dist.ct import derived, dose
from ldct_dist.evaluate.protocols import PROTOCOLS
from ldct_dist.store import reader
from synthetic_dicom import phantom, write_series

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
    assert "run the same command again" in lines[0]


def test_the_version_says_what_runs_here(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ldct-dist", "--version"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    told = re.fullmatch(
        r"ldct_dist (\S+) \(commit \S+\), torch (\S+), Python 3\.\d+\.\d+\n", capsys.readouterr().out
    )
    assert told
    assert told.groups() == (version("ldct_dist"), version("torch"))


def test_ctrl_c_before_the_verb_runs_is_one_line_and_130(monkeypatch, capsys):
    """Such as while the verbs are imported."""

    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "main", interrupt)
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    assert ended.value.code == 130
    assert capsys.readouterr().err.splitlines() == ["interrupted; run the same command again"]


@pytest.fixture
def simulated_until(tmp_path, monkeypatch):
    """`simulate` into the folder `out`, which does the given thing once files stand in it under their temporary name."""

    def until(happen):
        write_series(tmp_path / "full", phantom())
        encoded = derived._encoded

        def amid(ds):
            if any(folder.iterdir() for folder in tmp_path.glob(".writing-out-*")):
                happen()
            return encoded(ds)

        monkeypatch.setattr(dose, "simulate_low_dose", lambda volume, *_: volume)
        monkeypatch.setattr(derived, "_encoded", amid)
        monkeypatch.setattr(
            sys, "argv", ["ldct-dist", "simulate", str(tmp_path / "full"), str(tmp_path / "out")]
        )
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code

    return until


def test_term_is_one_line_and_143_and_leaves_nothing_behind(simulated_until, tmp_path, capsys):
    before = signal.getsignal(signal.SIGTERM)
    assert before == signal.SIG_DFL
    try:
        # what would end this process if it were not heeded
        code = simulated_until(
            lambda: os.kill(os.getpid(), signal.SIGTERM if signal.getsignal(signal.SIGTERM) != before else 0)
        )
    finally:
        after = signal.signal(signal.SIGTERM, before)
    assert code == 143
    assert after == before
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "terminated; run the same command again: what was finished is kept, the rest is done again"
    assert os.listdir(tmp_path) == ["full"]


def test_term_stays_ignored_where_the_caller_ignores_it(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(
        sys, "argv", ["ldct-dist", "simulate", str(tmp_path / "absent"), str(tmp_path / "out")]
    )
    monkeypatch.setattr(cli, "app", lambda: seen.append(signal.getsignal(signal.SIGTERM)))
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        cli.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIG_IGN]


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
