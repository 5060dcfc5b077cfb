"""What a rank does before it trains, however it was started, and the function that submitit runs on every rank."""

from __future__ import annotations

import os
import platform
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from submitit import JobEnvironment
from submitit.slurm.slurm import SlurmJobEnvironment

from ldct_dist.errors import UserError, memory_for


@dataclass(frozen=True)
class Train:
    """The function that submitit pickles: trains the run that the config describes, as one of its ranks.

    Returns 0 when the run is done; ends the process with the exit code of `ldct-dist train` otherwise.
    """

    config: Path
    allow_new_data: bool = False

    def __call__(self) -> int:
        # The result of this rank before a requeue must not be taken for its result now.
        if "SUBMITIT_FOLDER" in os.environ:  # not in submitit's debug mode
            JobEnvironment().paths.result_pickle.unlink(missing_ok=True)
        _join_as_submitit_says()
        try:
            code = train(self.config, [], self.allow_new_data)
        except UserError as e:
            print(f"error: {e}", file=sys.stderr)
            code = 2
        if code != 0:
            # Not returned: submitit would count it as a success, and the job script as the end of the run.
            raise SystemExit(code)
        return 0


def train(config: Path, overrides: list[str], allow_new_data: bool = False) -> int:
    """Train as one rank of those that the launcher started; the exit code."""
    from ldct_dist import config as configs
    from ldct_dist.train.config import RunConfig
    from ldct_dist.train.trainer import train as run

    name_interface()
    remedy = "lower micro_batch, or set model.activation_checkpointing=selective or full; `ldct-dist plan` tells what fits"
    with memory_for(platform.node(), remedy):
        return int(run(configs.read(RunConfig, config, overrides), allow_new_data))


def name_interface() -> None:
    """Under srun on several nodes, set gloo's interface to the one between them, unless the environment names one.

    By default, gloo takes the interface of the address of the node's own name: on Debian that may be the loopback.
    """
    nodes = SlurmJobEnvironment().hostnames
    if "SLURM_STEP_ID" not in os.environ or len(nodes) < 2 or "GLOO_SOCKET_IFNAME" in os.environ:
        return
    from ldct_dist.cluster.checks.network import interface_towards

    other = next(node for node in nodes if node != os.environ["SLURMD_NODENAME"])
    with suppress(OSError):  # only Slurm knows that node's name: gloo has to choose by itself
        os.environ["GLOO_SOCKET_IFNAME"] = interface_towards(other)


def _join_as_submitit_says() -> None:
    """Set a launcher's variables for ranks that submitit started on this machine. Its job id, a pid, makes the port
    differ between two such jobs."""
    if "SUBMITIT_LOCAL_NTASKS" not in os.environ:
        return
    env = JobEnvironment()
    os.environ |= {
        **{"RANK": str(env.global_rank), "WORLD_SIZE": str(env.num_tasks)},
        **{"LOCAL_RANK": str(env.local_rank), "LOCAL_WORLD_SIZE": str(env.num_tasks)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(10000 + int(env.job_id) % 20000)},
    }
