"""The environment to submit a job script from. sbatch hands it on to the job, and heeds part of it more than the script."""

from __future__ import annotations

import os
import re

# Expressions for `re` and for grep -E.
KEPT = "SLURM_(CONF|CLUSTERS|JWT|TIME_FORMAT)"
"""names of what a person, or a site, tells Slurm's commands: of all of Slurm's variables these alone stay"""
OF_A_JOB = (
    "SLURMD?_.*|SRUN_.*|SUBMITIT_.*|PMI[0-9X]?_.*|OMPI_COMM_.*|TORCHELASTIC_.*|MASTER_(ADDR|PORT)|"
    "((LOCAL|GROUP|ROLE)_)?(RANK|WORLD_SIZE)|ROLE_NAME"
)
"""names of what a job, or a launcher, is told of itself, and of nothing that it starts as another job"""
# What a script means by not saying it: it is no array, has one log, and is not waited for.
_UNSAID = ("ARRAY_INX", "ERROR", "WAIT")
_MEM = ("MEM_PER_NODE", "MEM_PER_CPU", "MEM_PER_GPU")
_BEATEN = {
    "time": ("TIMELIMIT",),
    "requeue": ("NO_REQUEUE",),
    "no-requeue": ("REQUEUE",),
    "cpu-freq": ("CPU_FREQ_REQ",),
    "switches": ("REQ_SWITCH", "WAIT4SWITCH"),
    # of these, sbatch takes only one
    "cpus-per-task": ("CPUS_PER_GPU",),
    **dict.fromkeys(("mem", "mem-per-cpu", "mem-per-gpu"), _MEM),
}
"""which SBATCH_ variables an option's own line goes before, where they are not named as it is"""


def beaten(script: str) -> str:
    """Names of the SBATCH_ variables that sbatch would take rather than what this script says: an expression, too."""
    names = set(_UNSAID)
    for option in re.findall(r"^#SBATCH --([a-z0-9-]+)", script, re.MULTILINE):
        names |= {option.upper().replace("-", "_"), *_BEATEN.get(option, ())}
    return f"SBATCH_({'|'.join(sorted(names))})"


def left_out(script: str) -> list[str]:
    """The names of the variables in this process's environment that are not to reach sbatch with this script."""
    foreign = re.compile(f"{OF_A_JOB}|{beaten(script)}")
    return [name for name in os.environ if foreign.fullmatch(name) and not re.fullmatch(KEPT, name)]


def outside(script: str = "") -> dict[str, str]:
    """This process's environment without them: for sbatch with this script, or for srun into another job."""
    unwanted = left_out(script)
    return {name: value for name, value in os.environ.items() if name not in unwanted}
