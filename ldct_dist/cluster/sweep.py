"""One config with several values of some keys: a run for each combination, side by side in TensorBoard."""

from __future__ import annotations

import itertools
import re
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import summary_v2 as hp
from tensorboard.summary.writer.record_writer import RecordWriter

from ldct_dist import config as configs
from ldct_dist.cluster.local import LocalRanks
from ldct_dist.cluster.progress import read_progress
from ldct_dist.errors import UserError
from ldct_dist.models import installed
from ldct_dist.models.registry import ModelConfig, outline
from ldct_dist.store.reader import Store
from ldct_dist.train.config import RunConfig
from ldct_dist.train.run import RunFolder

Value = str | float | bool
_HPARAMS_FILE = "events.out.tfevents.0.hparams"  # TensorBoard reads what has tfevents in its name


@dataclass(frozen=True)
class Point:
    """One run of a sweep. overrides: those that make its config of the sweep's. place: its value on each axis."""

    config: RunConfig
    overrides: list[str]
    place: dict[str, Value]

    @property
    def folder(self) -> Path:
        return self.config.runs / self.config.name

    @property
    def done(self) -> bool:
        """Whether it has been trained for as many steps as its config says now."""
        checkpoint = read_progress(self.folder).checkpoint
        return checkpoint is not None and checkpoint >= self.config.steps


@dataclass(frozen=True)
class Sweep:
    """The runs of a sweep. folder: holds a run folder for each. axes: the keys with several values, as they were written,
    and these values."""

    folder: Path
    axes: dict[str, list[Value]]
    points: list[Point]


def plan(config: Path, arguments: Sequence[str]) -> Sweep:
    """The runs of the sweep, in the order of the arguments, the last key varying fastest. Writes nothing.

    arguments: `key=value` for all runs, `key=value,value,...` for an axis. A key is dotted (`optim.lr`), or
    its last part, if no other setting ends so (`lr`); `model=unet3d-s` is a network and its size. A comma within brackets
    or quotes belongs to the value. The names of the runs follow from their values.

    Raises UserError for a mistake in any point, and where one was trained with other settings than these before.
    """
    given = [_argument(argument) for argument in arguments]
    base = configs.read(RunConfig, config, [o for key, values in given for o in overrides_of(key, values[0])])
    folder = base.runs / f"{base.name}-sweep"
    keys = [key for key, values in given if len(values) > 1]
    if not keys:
        raise UserError("a sweep needs a key with several values, such as lr=1e-4,3e-4")
    points: dict[str, Point] = {}
    for values in itertools.product(*(values for _, values in given)):
        overrides = [
            o for (key, _), value in zip(given, values, strict=True) for o in overrides_of(key, value)
        ]
        point = configs.read(RunConfig, config, [*overrides, f"runs={folder}"])
        outline(point.model)  # options that the network does not take are refused now, not in the last run
        place = {key: _value(point, key) for key in keys}
        name = "_".join(f"{key.rpartition('.')[2]}-{_plain(value)}" for key, value in place.items())
        if name in points:
            raise UserError(f"two runs of the sweep would be called {name}: a value stands there twice")
        overrides += [f"runs={folder}", f"name={name}"]
        points[name] = Point(configs.read(RunConfig, config, overrides), overrides, place)
        RunFolder(points[name].folder).check(points[name].config)
    axes = {key: list(dict.fromkeys(p.place[key] for p in points.values())) for key in keys}
    return Sweep(folder, axes, list(points.values()))


def overrides_of(key: str, value: str) -> list[str]:
    """The dotted overrides that a key of a sweep, short or not, stands for."""
    if key == "model":
        if value in installed.names(installed.NETWORKS):  # without sizes
            return [f"model.name={value}", f"model.size={ModelConfig().size}"]
        name, dash, size = value.partition("-")
        if not dash:
            raise UserError(f"model={value}: write the network and its size, such as model=unet3d-s")
        return [f"model.name={name}", f"model.size={size}"]
    return [f"{dotted(key)}={value}"]


def dotted(key: str) -> str:
    """The full name of a run's setting; `key` itself if there is none, for the config to refuse it.

    Raises UserError if several settings end with `key`, or it is the name of a section.
    """
    every = list(configs.settings(RunConfig))
    if key in every:
        return key
    meant = [leaf for leaf in every if leaf.endswith(f".{key}")]
    if len(meant) == 1:
        return meant[0]
    if meant:
        raise UserError(f"{key}: which one, {', '.join(meant)}?")
    inside = [leaf for leaf in every if leaf.startswith(f"{key}.")]
    if inside:
        raise UserError(f"{key}: name one of {', '.join(inside)}")
    return key


def write_hparams(sweep: Sweep) -> None:
    """Write what TensorBoard's HParams view needs: the axes beside the runs, and in each run's folder its place.

    These are files of their own: what is in the trainer's event files is cut back to the checkpoint at each start.
    """
    metrics = [hp.Metric("train/loss", group="tensorboard", display_name="train loss")]
    for protocol in dict.fromkeys(p.config.validation.protocol for p in sweep.points):
        metrics += [
            hp.Metric(
                f"validation/{figure} ({protocol})",
                group="tensorboard",
                display_name=f"{figure} ({protocol})",
            )
            for figure in ("rmse_hu", "psnr_db", "ssim")
        ]
    axes = [hp.HParam(key, hp.Discrete(values)) for key, values in sweep.axes.items()]
    _write_event(sweep.folder, hp.hparams_config_pb(axes, metrics, time_created_secs=0))
    for point in sweep.points:
        _write_event(point.folder, hp.hparams_pb(point.place, trial_id=point.config.name, start_time_secs=0))


def _write_event(folder: Path, summary: Summary) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / _HPARAMS_FILE, "wb") as f:
            writer = RecordWriter(f)
            writer.write(Event(wall_time=0, file_version="brain.Event:2").SerializeToString())
            writer.write(Event(wall_time=0, step=0, summary=summary).SerializeToString())
    except OSError as e:
        raise UserError(f"{folder}: {e.strerror}; choose another folder with runs=FOLDER") from e


def _argument(text: str) -> tuple[str, list[str]]:
    """`lr=1e-4,3e-4` as a key and its values."""
    key, equals, values = text.partition("=")
    # commas outside [], {} and quotes
    parts = re.findall(r"""((?:\[[^\]]*\]|\{[^}]*\}|"[^"]*"|'[^']*'|[^,])+)""", values)
    if not equals or not parts:
        raise UserError(f"{text}: write it as key=value, or key=value,value for an axis")
    return key, parts


def _value(config: RunConfig, key: str) -> Value:
    """The value as the config understood it: 1e-4 and 0.0001 are one."""
    if key == "model":
        return config.model.label
    node: Any = config
    for part in dotted(key).split("."):
        node = node[part] if isinstance(node, dict) else getattr(node, part)
    return node if isinstance(node, str | int | float) else str(node)


def _plain(value: Value) -> str:
    """The value as a part of a file name."""
    text = f"{value:g}".replace("+", "") if isinstance(value, float) else str(value)
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")


def run_here(sweep: Sweep, config: Path, ranks: int, say: Callable[[str], None] = print) -> int:
    """Train the points that are not done yet, one after the other, each with `ranks` local ranks.

    After a run that fails, the others are trained all the same. Returns the command's exit code: 0 all done, 1 some
    failed, 75 interrupted with a checkpoint (start the sweep again to go on). Raises UserError where there is no store.
    """
    for path in dict.fromkeys(point.config.store for point in sweep.points):
        Store(path)  # without one, every run would fail
    write_hparams(sweep)
    failed = []
    for i, point in enumerate(sweep.points, 1):
        name = f"{point.config.name} ({i}/{len(sweep.points)})"
        if point.done:
            say(f"{name}: done already")
            continue
        say(f"{name}: training")
        with LocalRanks(["train", str(config), *point.overrides], ranks) as running:
            try:
                code = running.wait()
            except KeyboardInterrupt:
                running.signal(signal.SIGUSR1)
                return running.wait()
        if code != 0:
            failed.append(point.config.name)
            say(f"{name}: ended with exit code {code}")
    say(f"{len(sweep.points) - len(failed)} of {len(sweep.points)} runs done -> {sweep.folder}")
    return 1 if failed else 0
