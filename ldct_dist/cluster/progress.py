"""How far a run has come, read from its folder alone: without Slurm, torch or locks."""

from __future__ import annotations

import json
import os
import platform
import struct
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import yaml
from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event

from ldct_dist.checkpoint import generation as generations
from ldct_dist.checkpoint import retention
from ldct_dist.checkpoint.manifest import NAME as MANIFEST
from ldct_dist.errors import UserError

_SCALAR_BYTES = 1024  # no record of a scalar is larger; images are
_BEATS_S = 3600.0  # a run that is not watched, by a hang_s beyond all measure, writes no beat after its first
_RECENT = 120  # records looked at: some twenty reports of five scalars
_TAIL_BYTES = 1 << 16  # of an event file: more than these take, where no image lies among them
# Of a report's tags; speed: in runs of a job that was submitted with earlier code, which had it for some of workload.
_GROUPS = ("train/", "workload/", "speed/")
_SHORT = bytes(4)  # the upper half of a record's length
# The one in C, where there is one, takes a tenth of the time.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Report:
    """One of the trainer's reports, as TensorBoard got it."""

    step: int
    time: float
    """seconds since the epoch"""
    figures: dict[str, float]
    """by tag, without its group: loss, crops_per_s, data_wait_percent, ..."""


@dataclass(frozen=True)
class Progress:
    """What a run's folder says. Times are in seconds since the epoch; None: not known, or not yet."""

    step: int = 0
    steps: int | None = None
    loss: float | None = None
    """HU (HU^2 for mse): mean over the latest report's steps; before the first report, of the latest step"""
    crops_per_s: float | None = None
    wait_percent: float | None = None
    """share of the time in which the step waited for data"""
    seconds_a_step: float | None = None
    """wall time, with validations and saves"""
    checkpoint: int | None = None
    """step of the newest checkpoint"""
    checkpoint_time: float | None = None
    written: float | None = None
    """when the newest step was recorded"""
    beat: float | None = None
    """when a rank of the newest start last wrote its heartbeat; 0: all of them have ended as they should"""
    beat_s: float = 300.0
    """the run's hang_s: silence after which its ranks take one of them for dead"""
    last_start: dict[str, Any] | None = None
    """the newest entry of environment.json"""

    @property
    def done(self) -> bool:
        return self.checkpoint is not None and self.steps is not None and self.checkpoint >= self.steps

    @property
    def eta_s(self) -> float | None:
        """Seconds of running that are left."""
        if self.seconds_a_step is None or self.steps is None:
            return None
        return max(0, self.steps - self.step) * self.seconds_a_step

    def alive(self, now: float) -> bool:
        """Whether a process trains the run: known by its pid on this host, else judged by its latest signs of life."""
        start = self.last_start
        if start is not None and start["host"] == platform.node():
            return is_running(start)
        if self.beat == 0:
            return False
        # On another host, silence counts as the end: a minute (or 20 steps, if those take longer) without a step, and as
        # long without a heartbeat, which goes on while no step is recorded, such as in a validation.
        silence = max(60.0, 20 * (self.seconds_a_step or 0.0))
        steps = self.written is not None and now - self.written < silence and not self.done
        beats = self.beat is not None and now - self.beat < max(silence, min(self.beat_s, _BEATS_S))
        return steps or beats


def read_progress(run: Path) -> Progress:
    """The progress of the run in the folder `run`, as far as it has been written.

    Raises UserError for a file that does not hold what the trainer writes.
    """
    reports = _reports(run / "tensorboard")
    latest = reports[-1].figures if reports else {}
    line, written = _last_line(run / "losses.jsonl")
    checkpoints, _ = retention.newest_first(run / "checkpoints")
    newest = checkpoints[0] if checkpoints else None
    starts, config = read_starts(run), _config(run)
    return Progress(
        step=line.get("step", newest[1].step if newest else 0),
        steps=config.get("steps"),
        loss=latest.get("loss", line.get("loss")),
        crops_per_s=latest.get("crops_per_s"),
        wait_percent=latest.get("data_wait_percent"),
        seconds_a_step=_pace(reports),
        checkpoint=newest[1].step if newest else None,
        checkpoint_time=(newest[0] / MANIFEST).stat().st_mtime if newest else None,
        written=written,
        beat=_beat(run / "generations"),
        beat_s=config.get("hang_s", Progress.beat_s),
        last_start=starts[-1] if starts else None,
    )


def _beat(claims: Path) -> float | None:
    """See `Progress.beat`; None where no start of the run has claimed anything."""
    newest = generations.newest(claims) if claims.is_dir() else 0
    times = []
    for path in (claims / f"{newest:06d}").glob("*.beats"):
        with suppress(FileNotFoundError):  # its ranks have just left
            times.append(path.stat().st_mtime)
    return max(times, default=0.0) if newest else None


def is_running(start: dict[str, Any]) -> bool:
    """Whether the process of a start on this host is still alive, and its pid not that of another process by now."""
    try:
        arguments = (
            Path(f"/proc/{start.get('pid')}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
        )
    except OSError:
        return False
    given = start["command"][1:]  # the interpreter may have been called by another path
    return arguments[-len(given) :] == given


def _config(run: Path) -> dict[str, Any]:
    return _parsed(run / "config.yaml", partial(yaml.load, Loader=_LOADER), dict) or {}


def read_starts(run: Path) -> list[dict[str, Any]]:
    """How the run was started each time, oldest first: the entries of environment.json."""
    return _parsed(run / "environment.json", json.loads, list) or []


def _parsed(path: Path, parse: Callable[[str], Any], kind: type) -> Any:
    """The contents of a file as a `kind`; None if there is no such file."""
    try:
        content = parse(path.read_text())
    except FileNotFoundError:
        return None
    except OSError as e:
        raise _unreadable(path, e) from e
    except (ValueError, yaml.YAMLError) as e:
        raise UserError(f"{path}: not readable: {e}") from e
    if not isinstance(content, kind):
        raise UserError(f"{path}: not what a run writes there")
    return content


def _last_line(path: Path) -> tuple[dict[str, Any], float | None]:
    """(the newest whole line of losses.jsonl, when it was written)."""
    try:
        with open(path, "rb") as f:
            facts = os.fstat(f.fileno())
            f.seek(max(0, facts.st_size - 4096))
            tail = f.read()
    except FileNotFoundError:
        return {}, None
    except OSError as e:
        raise _unreadable(path, e) from e
    whole = tail[: tail.rfind(b"\n") + 1].splitlines()
    try:
        return (json.loads(whole[-1]), facts.st_mtime) if whole else ({}, None)
    except ValueError as e:
        raise UserError(f"{path}: its last line is not what a run writes there") from e


def _unreadable(path: Path, why: OSError) -> UserError:
    return UserError(f"{path}: cannot be read ({why.strerror}); make it readable, or choose another folder")


def _pace(reports: list[Report]) -> float | None:
    """Seconds a step between the reports, which a restart in the middle would make too many."""
    if len(reports) < 2:
        return None
    first, last = reports[0], reports[-1]
    return (last.time - first.time) / (last.step - first.step) if last.step > first.step else None


def _reports(folder: Path) -> list[Report]:
    """The latest reports of the newest start that made one, oldest first."""
    for path in sorted(folder.glob("events.out.tfevents.*"), key=lambda p: p.stat().st_mtime, reverse=True):
        reports: dict[int, Report] = {}
        for event in _recent_scalars(path):
            figures = {
                value.tag.partition("/")[2]: value.simple_value
                for value in event.summary.value
                if value.tag.startswith(_GROUPS)
            }
            if figures:
                before = reports.get(event.step)
                reports[event.step] = Report(
                    event.step, event.wall_time, (before.figures if before else {}) | figures
                )
        if reports:
            return [reports[step] for step in sorted(reports)]
    return []


def _recent_scalars(path: Path) -> Iterator[Event]:
    """Read from the end: the file of a start grows with its steps, to tens of MiB after a million, beside the images."""
    with open(path, "rb") as f:
        size, tail = os.fstat(f.fileno()).st_size, _TAIL_BYTES
        while True:
            start = max(0, size - tail)
            payloads = deque(_small_records(f, _first_record(f, start), size), maxlen=_RECENT)
            if start == 0 or len(payloads) == _RECENT:
                break
            tail *= 8
    for payload in payloads:
        try:
            yield Event.FromString(payload)
        except DecodeError:
            return  # a record cut short: nothing follows it


def _first_record(f: BinaryIO, start: int) -> int:
    """Where the first record from `start` on begins, as the checksum of its length tells; the end if none does."""
    if start == 0:
        return 0
    f.seek(start)
    rest = f.read()
    at = rest.find(_SHORT)
    while at >= 0:
        length, checksum = rest[at - 4 : at + 4], rest[at + 4 : at + 8]
        if at >= 4 and checksum == _masked_crc(length):
            return start + at - 4
        at = rest.find(_SHORT, at + 1)
    return start + len(rest)


def _masked_crc(content: bytes) -> bytes:
    """As in that format; TensorBoard has the same, behind imports of half of what `status` takes."""
    crc = google_crc32c.value(content)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _small_records(f: BinaryIO, start: int, size: int) -> Iterator[bytes]:
    """The records from `start` on that may be scalars, of a file of `size` bytes; images are skipped, not read.

    A record: length (8 bytes), its checksum (4), payload, its checksum (4).
    https://www.tensorflow.org/tutorials/load_data/tfrecord#tfrecords_format_details
    """
    end = start
    while end + 12 <= size:
        f.seek(end)
        (length,) = struct.unpack("<Q4x", f.read(12))
        end += 12 + length + 4
        if length <= _SCALAR_BYTES and end <= size:
            yield f.read(length)
