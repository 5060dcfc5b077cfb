"""Figures on a disk that takes none for a while."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from ldct_dist.train.board import Board


def write_all(board: Board, steps: Iterable[int]) -> None:
    for step in steps:
        with board.writing() as writer:
            writer.add_scalar("loss", float(step), step)
            writer.flush()


def test_a_lost_disk_costs_figures_no_traceback_and_nothing_once_it_is_back(tmp_path, capfd):
    folder = tmp_path / "tensorboard"
    board = Board(folder, kept=0)
    write_all(board, [1])
    folder.rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError):
        write_all(board, range(2, 5))  # the thread's failure is heard a call later
    (tmp_path / "away").rename(folder)
    write_all(board, [5])
    board.close()
    assert capfd.readouterr().err == ""
    # Each file by itself: two of the same second are read by their number within the process, and 10 goes before 9.
    files = [EventAccumulator(str(file)).Reload() for file in folder.iterdir()]
    seen = sorted(e.step for file in files for e in file.Scalars("loss"))
    assert seen[0] == 1
    assert seen[-1] == 5


def test_a_thread_that_meets_the_lost_disk_only_after_the_end_prints_no_traceback_either(
    tmp_path, monkeypatch
):
    told: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", told.append)
    thread, closed, late = event_file_writer._AsyncWriterThread, threading.Event(), []
    run = thread.run

    def run_late(self):
        try:
            run(self)
        except OSError:
            late.append(self)
            closed.wait()
            raise

    monkeypatch.setattr(thread, "run", run_late)
    board = Board(tmp_path / "tensorboard", kept=0)
    write_all(board, [1])
    (tmp_path / "tensorboard").rename(tmp_path / "away")
    with pytest.raises(FileNotFoundError):
        write_all(board, range(2, 5))
    board.close()
    closed.set()
    late[0].join()
    assert told == []
