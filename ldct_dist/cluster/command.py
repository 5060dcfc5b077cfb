"""The words of `ldct-dist submit`: which are overrides of the run, and which are options of sbatch."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from submitit import Job

from ldct_dist import config as configs
from ldct_dist.checkpoint.load import weights_of
from ldct_dist.cluster.parts import Parts, array_script
from ldct_dist.cluster.shape import Options
from ldct_dist.cluster.submit import Request
from ldct_dist.denoise.claim import refuse_others
from ldct_dist.denoise.cohort import cases_of
from ldct_dist.denoise.volumes import SeriesDenoiser
from ldct_dist.errors import UserError
from ldct_dist.evaluate.evaluation import Evaluation
from ldct_dist.files import refuse_inside
from ldct_dist.models.weights import weights_hash
from ldct_dist.store.ingest import IngestConfig, check
from ldct_dist.train.config import RunConfig

INGEST_PARTS = 8
"""of an ingest, unless told otherwise"""
EVALUATE_PARTS = 8
"""of an evaluation, at most, unless told otherwise: each tunes the filters for itself"""
MOST_PARTS = 256
"""of a cohort, unless told otherwise: Slurm's own limit on an array (MaxArraySize) is 1001 where a site set none"""
_FLAG = re.compile(
    "contiguous|exclusive|get-user-env|hold|ignore-pbs|nice|no-kill|no-requeue|overcommit|oversubscribe|propagate|quiet|"
    "reboot|requeue|spread-job|use-min-nodes|verbose|wait"
)
"""options to which sbatch takes no value, or one behind "=" alone"""
_OF_DENOISE = {"--bf16": False, "--strength": True}
"""its own options, and whether they have a value"""
_OVERRIDE = re.compile(r"[a-z_]+(\.[a-z_]+)*=.*", re.DOTALL)


def parse(arguments: Sequence[str], site: str | None, allow_new_data: bool) -> Request:
    """`CONFIG key=value ... --option value --option=value --flag` as a request; UserError for anything else."""
    words, options = split(arguments)
    if not words:
        raise UserError("submit: name the run's YAML, such as configs/mayo2016_unet3d.yaml")
    config, *overrides = words
    return Request(configs.read(RunConfig, Path(config), overrides), options, site, allow_new_data)


def parse_parts(
    arguments: Sequence[str], site: str | None, parts: int | None, at_once: int | None = None
) -> Parts:
    """`ingest SOURCE STORE ...` or `denoise WEIGHTS COHORT OUT` as an array.

    Raises UserError for what every task of it would refuse, before it waits in a queue.
    """
    verb, *rest = arguments
    make = _ingest if verb == "ingest" else _denoise
    return make(rest, site, parts, at_once)


def _ingest(arguments: list[str], site: str | None, parts: int | None, at_once: int | None) -> Parts:
    words, options = split(arguments)
    folders = [word for word in words if not _OVERRIDE.fullmatch(word)]
    source, store = _paths("ingest", folders, 2)
    tasks = INGEST_PARTS if parts is None else parts
    script = array_script("ingest", ["ingest", *words], _jobs_beside(store), tasks, options, site, at_once)
    settings = configs.read(IngestConfig, None, [word for word in words if word not in folders])
    check(source, store, settings)
    return Parts(script, shlex.join(["ldct-dist", "ingest", *words]), then=["finalise", folders[-1]])


def _denoise(arguments: list[str], site: str | None, parts: int | None, at_once: int | None) -> Parts:
    own, others = set_apart(arguments, _OF_DENOISE)
    words, options = split(others)
    run, cohort, out = _paths("denoise", words, 3)
    out = out.absolute()
    cases = cases_of(cohort)
    refuse_inside(out, cohort)
    # A run's best weights may be others by the time that the last task starts: all tasks take this copy.
    weights = weights_of(run)
    copy = _jobs_beside(out) / f"{weights_hash(weights)}.safetensors"
    refuse_others(out, SeriesDenoiser.load(weights, "cpu", *_manner(own)).name)
    command = ["denoise", str(copy), *words[1:], *own]
    tasks = min(len(cases), MOST_PARTS) if parts is None else parts
    script = array_script("denoise", command, _jobs_beside(out), tasks, options, site, at_once)
    # --part makes it a cohort: without it, all cases would be series of one patient.
    here = shlex.join(["ldct-dist", "denoise", *words, *own, "--part=0/1"])
    return Parts(script, here, pinned={copy: weights})


def evaluation_parts(
    request: Evaluation,
    words: Sequence[str],
    own: Sequence[str],
    options: Options,
    site: str | None,
    parts: int | None,
    at_once: int | None,
) -> Parts:
    """`evaluate WEIGHTS... STORE --out REPORT` as an array, and the report by a job after it.

    request: of `words`, the weights and the store, and of `own`, options of `evaluate`. Raises UserError.
    """
    if request.out is None:
        raise UserError(
            "submit evaluate: its tasks keep their findings in the report's folder; add --out FOLDER"
        )
    folder = _jobs_beside(request.out)
    # As for denoise, all tasks take these copies.
    copies = {name: folder / f"{request.hashes[name]}.safetensors" for name in request.weights}
    named = [f"{name}={copies[full]}" for name, full in zip(request.names, request.weights, strict=True)]
    command = ["evaluate", *named, words[-1], *own]
    tasks = min(len(request.examination.items), EVALUATE_PARTS) if parts is None else parts
    script = array_script("evaluate", command, folder, tasks, options, site, at_once)
    return Parts(
        script,
        shlex.join(["ldct-dist", "evaluate", *words, *own]),
        then=command,
        then_on_gpus=True,
        pinned={copies[name]: path for name, path in request.weights.items()},
    )


def set_apart(arguments: Sequence[str], takes: Mapping[str, bool]) -> tuple[list[str], list[str]]:
    """(options of a verb with their values, all others). takes: by the verb's options, whether they have a value."""
    own, others, waiting = [], [], iter(arguments)
    for argument in waiting:
        name, equals, _ = argument.partition("=")
        if name not in takes:
            others.append(argument)
            continue
        own.append(argument)
        if takes[name] and not equals:
            own += [value for value in [next(waiting, None)] if value is not None]
    return own, others


def _paths(verb: str, words: Sequence[str], count: int) -> list[Path]:
    if len(words) != count:
        raise UserError(
            f"submit {verb}: give what `ldct-dist {verb} --help` asks for, before the options of sbatch"
        )
    return [Path(word) for word in words]


def _jobs_beside(out: Path) -> Path:
    """The folder for an array's logs and scripts, beside what the array writes."""
    out = out.absolute()
    return out.with_name(f"{out.name}.jobs")


def _manner(own: Sequence[str]) -> tuple[bool, float]:
    """(bf16, strength), of the options of `ldct-dist denoise`."""
    _, options = split(own)
    strength = options.get("strength", "1")
    try:
        return "bf16" in options, float("" if strength is True else strength)
    except ValueError as e:
        raise UserError(f"--strength={strength}: give a share above 0 and up to 1") from e


def split(arguments: Sequence[str]) -> tuple[list[str], dict[str, str | bool]]:
    """(words that are no options, options of sbatch by their long names).

    What follows an option is its value, unless that is a flag (`--exclusive runs/mayo`), or what follows is an option or an
    override itself.
    """
    words: list[str] = []
    options: dict[str, str | bool] = {}
    flag = None
    for argument in arguments:
        if argument.startswith("--"):
            key, equals, value = argument[2:].partition("=")
            options[key] = value if equals else True
            flag = None if equals or _FLAG.fullmatch(key) else key
        elif argument.startswith("-"):
            raise UserError(
                f"{argument}: write options of sbatch by their long names, such as --partition=gpu"
            )
        elif flag is not None and not _OVERRIDE.fullmatch(argument):
            options[flag] = argument
            flag = None
        else:
            words.append(argument)
            flag = None
    return words, options


def announce(request: Request, job: Job[int], cluster: str) -> Iterator[str]:
    """What to tell a person who has just submitted a run."""
    logs = f"{request.folder}/{job.job_id}"
    yield f"job      {job.job_id}"
    yield f"run      {request.run}"
    if cluster != "debug":
        yield f"log      {logs}.log" if cluster == "slurm" else f"logs     {logs}_*_log.out, {logs}_*_log.err"
    yield f"status   ldct-dist status {shlex.quote(str(request.run))}"
    yield f"figures  tensorboard --logdir {shlex.quote(str(request.run.parent))}"
    for path in (request.config.store, request.config.init_from):
        if path is not None and not os.path.exists(path):  # Path.exists would raise PermissionError
            yield f"note     {path} is not there, as seen from this machine; without it the job ends as it starts"
