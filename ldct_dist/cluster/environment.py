"""The environment from which to submit a job script.

sbatch hands it on to the job, and of what both say, some variables (SBATCH_*) override the script.
"""

from __future__ import annotations

import os
import re

# Regular expressions for `re` and for grep -E alike.
KEPT = "SLURM_(CONF|CLUSTERS|JWT|TIME_FORMAT)"
"""variables with which a person or a site configures Slurm's commands: of Slurm's own, only these stay"""
OF_A_JOB = (
    "SLURMD?_.*|SRUN_.*|SUBMITIT_.*|PMI[0-9X]?_.*|OMPI_COMM_.*|TORCHELASTIC_.*|MASTER_(ADDR|PORT)|"
    "((LOCAL|GROUP|ROLE)_)?(RANK|WORLD_SIZE)|ROLE_NAME"
)
"""variables that tell a job, or a process of a launcher, about itself, and are wrong in another job"""
# A script that does not say them is no array, has one log, and is not waited for.
_UNSAID = ("ARRAY_INX", "ERROR", "WAIT")
_MEM = ("MEM_PER_NODE", "MEM_PER_CPU", "MEM_PER_GPU")
_BEATEN = {
    "time": ("TIMELIMIT",),
    "requeue": ("NO_REQUEUE",),
    "no-requeue": ("REQUEUE",),
    "cpu-freq": ("CPU_FREQ_REQ",),
    "switches": ("REQ_SWITCH", "WAIT4SWITCH"),
    # sbatch takes only one of these
    "cpus-per-task": ("CPUS_PER_GPU",),
    **dict.fromkeys(("mem", "mem-per-cpu", "mem-per-gpu"), _MEM),
}
"""the SBATCH_ variables that an option's line has to win over, where they are not named like the option"""


def beaten(script: str) -> str:
    """A regular expression for the SBATCH_ variables that sbatch would prefer to what this script says."""
    names = set(_UNSAID)
    for option in re.findall(r"^#SBATCH --([a-z0-9-]+)", script, re.MULTILINE):
        names |= {option.upper().replace("-", "_"), *_BEATEN.get(option, ())}
    return f"SBATCH_({'|'.join(sorted(names))})"


def left_out(script: str) -> list[str]:
    """The variables of this process's environment that sbatch must not see when it is given this script."""
    foreign = re.compile(f"{OF_A_JOB}|{beaten(script)}")
    return [name for name in os.environ if foreign.fullmatch(name) and not re.fullmatch(KEPT, name)]


def outside(script: str = "") -> dict[str, str]:
    """This process's environment without those: for sbatch with this script, or for srun into another job."""
    unwanted = left_out(script)
    return {name: value for name, value in os.environ.items() if name not in unwanted}
