"""Before the first big job: does this site do what a run will ask of it? One line a check."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import ldct_dist
from ldct_dist.checkpoint.retention import CheckpointConfig
from ldct_dist.cluster import jobs
from ldct_dist.cluster.checks import Check, Finding, Probe, examine, folder, network, nodes
from ldct_dist.cluster.local import LocalRanks
from ldct_dist.cluster.rank import name_interface
from ldct_dist.cluster.sbatch import Script, check_options, rank_alone
from ldct_dist.cluster.shape import Options, shaped
from ldct_dist.cluster.site import read_site
from ldct_dist.data.plan import DataConfig
from ldct_dist.errors import UserError
from ldct_dist.files import real
from ldct_dist.models.registry import outline
from ldct_dist.rendezvous import Unmet
from ldct_dist.train.config import RunConfig
from ldct_dist.train.strategy.parts import STATE_BYTES
from ldct_dist.world import World

JOIN_TIMEOUT_S = 60.0
Report = Callable[[Finding], None]


def launch_here(arguments: Sequence[str], tasks: int) -> int:
    """Examine this machine with `tasks` ranks; the exit code: 0 if all checks passed, else 1."""
    _quieten()
    with LocalRanks(["doctor-rank", *arguments], tasks) as ranks:
        return int(ranks.wait() != 0)


def launch_job(arguments: Sequence[str], runs: Path, site: str | None, options: Options) -> int:
    """The same by srun, on nodes of the cluster, in the environment that the site profile gives to the runs in `runs`.

    options: of srun, by their long names, with nodes. It waits until the nodes are free, as srun does.
    """
    command = job_command(arguments, runs, site, options)
    jobs.refuse_without_slurm("without --nodes, which checks this machine alone")
    _quieten()
    return int(subprocess.run(command, check=False).returncode != 0)


def job_command(arguments: Sequence[str], runs: Path, site: str | None, options: Options) -> list[str]:
    """The command that `launch_job` runs."""
    profile = read_site(site)
    package = Path(ldct_dist.__file__).parent.parent
    inside = real(runs) / "doctor"  # Script binds the folder around it into a container
    command = ["-m", "ldct_dist", "doctor-rank", f"--grace={profile.warn_s}", *arguments]
    script = Script("ldct-doctor", command, package, inside, Path.cwd(), sys.executable, site=profile)
    own = {
        "job-name": script.name,
        "time": "10",
        "kill-on-bad-exit": "0",
        "gpu-bind": profile.gpu_bind or False,
    }
    given = {**own, **shaped(options, profile)}
    check_options(given)
    words = [f"--{key}" if value is True else f"--{key}={value}" for key, value in given.items() if value]
    # --export, since some sites have srun pass on no variables by default.
    return ["srun", "--export=ALL", *words, *rank_alone(script)]


def _quieten() -> None:
    # torch warns of host names that it looks up for its logs alone.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if sys.stdout.isatty():
        os.environ.setdefault("FORCE_COLOR", "1")  # srun's tasks write into a pipe


def rank(runs: Path, config: RunConfig | None, grace_s: float, write_mib: int, report: Report) -> bool:
    """This rank's share of the examination. Rank 0 reports each finding as it comes; False there if a check failed."""
    name_interface()
    try:
        world = World.join(timeout_s=JOIN_TIMEOUT_S)
    except Unmet as e:
        report(Finding("meeting", False, str(e)))
        return False
    except UserError as e:  # with the wrong GPUs, say: training would end so, too
        report(Finding("ranks", False, str(e)))
        return False
    with world:
        try:
            return _examine(world, runs, config, grace_s, write_mib, report)
        except UserError as e:  # rank 0 speaks for all
            report(Finding("folder", False, str(e)))
            return False


def _examine(
    world: World, runs: Path, config: RunConfig | None, grace_s: float, write_mib: int, report: Report
) -> bool:
    hosts = world.gather(os.uname().nodename)
    inside = world.on_main(lambda: _fresh_folder(runs))
    probe = Probe(
        world,
        hosts,
        inside,
        write_mib,
        checkpoint_bytes(config) if config is not None else None,
        config.checkpoint.at_most(config.steps) if config is not None else CheckpointConfig().at_most(0),
        world.broadcast(
            {"before the time limit": grace_s} | parse_partition(os.environ.get("LDCT_PARTITION", ""))
        ),
        (config.data if config is not None else DataConfig()).threads,
    )

    def sound(checks: Sequence[Check]) -> bool:
        findings = []
        for check in checks:
            for finding in examine(probe, check):
                report(finding)
                findings.append(finding.ok)
        return world.broadcast(all(findings))

    try:
        outside = sound([*nodes.CHECKS, *network.CHECKS])
        return sound([folder.SHARED]) and sound(folder.INSIDE) and outside
    finally:
        if world.is_main:
            shutil.rmtree(inside, ignore_errors=True)  # a rank that still writes there has had its line


def checkpoint_bytes(config: RunConfig) -> int:
    """Size of one checkpoint of this run: weights, their average and the optimizer's state."""
    return STATE_BYTES * sum(p.numel() for p in outline(config.model).parameters())


def parse_partition(text: str) -> dict[str, float]:
    """{"at preemption": seconds} from the output of `scontrol show partition`; {} where preemption ends no job.

    A job that is suspended (SUSPEND, GANG) stays in memory and goes on later.
    """
    mode, grace = (re.search(rf"\b{key}=(\S+)", text) for key in ("PreemptMode", "GraceTime"))
    if mode is None or grace is None or not {"REQUEUE", "CANCEL"}.intersection(mode[1].split(",")):
        return {}
    return {"at preemption": float(grace[1])}


def _fresh_folder(runs: Path) -> Path:
    try:
        runs.mkdir(parents=True, exist_ok=True)
        inside = Path(tempfile.mkdtemp(prefix=".doctor-", dir=real(runs)))
    except OSError as e:
        raise UserError(f"{runs}: {e.strerror}; choose a folder that can be written (--runs)") from e
    return inside
