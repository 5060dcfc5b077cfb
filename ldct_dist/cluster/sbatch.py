"""Job scripts as text: a pure function of what is asked for. Every value is quoted, or refused."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ldct_dist.cluster.environment import KEPT, OF_A_JOB, beaten
from ldct_dist.cluster.shape import Options, limit_s, merged
from ldct_dist.cluster.site import Site
from ldct_dist.errors import UserError

_OPTION = re.compile(r"[a-z][a-z0-9-]*")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_OURS = ("output", "error", "open-mode", "chdir", "wrap", "array", "parsable", "export")


@dataclass(frozen=True)
class Script:
    """What a job script says. Paths are absolute.

    command: arguments of Python, such as ["-m", "ldct_dist", "train", "config.yaml"].
    code: the folder with the package to run. folder: for logs; of a training job, slurm/ in the run's folder.
    options: of sbatch, by their long names; true for those without a value.
    kind: "ranks" are started by srun, one task each. "parts" are the tasks of an array: each runs the command with
    --part i/n. "single" runs the command once.
    parts: tasks of an array of ranks or parts, of which `at_once` run at a time; 0: it is no array.
    """

    name: str
    command: Sequence[str]
    code: Path
    folder: Path
    workdir: Path
    python: str
    options: Options = field(default_factory=dict)
    site: Site = field(default_factory=Site)
    kind: Literal["ranks", "parts", "single"] = "ranks"
    parts: int = 0
    at_once: int | None = None


def render(script: Script) -> str:
    """The text of the job script. Raises UserError for a value that it cannot hold safely."""
    head = "#!/bin/bash\n" + "".join(f"#SBATCH {line}\n" for line in _directives(script))
    body = _filled(
        {"ranks": _RANKS, "parts": _PART, "single": _SINGLE}[script.kind],
        again=_again(script),
        beaten=shlex.quote(beaten(head)),
        insist=_INSIST,
        meeting=_MEETING,
        still_ours=_STILL_OURS,
        srun=_srun_options(script.site),
        hung=shlex.quote(f"{script.folder}/") + "$SLURM_JOB_ID.hung",
        parts=str(script.parts),
        launch=_launch(script),
    )
    return "\n".join([head, _environment(script), body])


def rank_alone(script: Script) -> list[str]:
    """The command of one rank, in the environment of a job script, for srun to start without one.

    It asks Slurm before the rank starts, since a container need not have Slurm's commands: it sets MASTER_ADDR and
    MASTER_PORT to where the ranks meet, and for rank 0 LDCT_PARTITION to the output of `scontrol show partition`.
    """
    return ["bash", "-c", f"{_environment(script)}{_INSIST}{_ALONE}{_MEETING}exec {_launch(script)}"]


def check_options(options: Options) -> None:
    """Raises UserError for an option that cannot be one of sbatch's, or that submit itself sets."""
    for key, value in options.items():
        if not _OPTION.fullmatch(key):
            raise UserError(f"--{key}: not an option of sbatch; write --long-name=value")
        if key in _OURS:
            raise UserError(f"--{key}: submit sets this itself; leave it out")
        _one_line(f"--{key}", str(value))


def _directives(script: Script) -> list[str]:
    """The options of sbatch, each as a line, in alphabetical order."""
    given = merged(script.options, script.site)
    check_options(given)
    is_array = script.parts > 0 and script.kind != "single"
    log = "%A_%a.log" if is_array else "%j.log"
    fixed: dict[str, str | bool] = {
        "job-name": script.name,
        "chdir": str(script.workdir),
        # Slurm reads % in file names as its own.
        "output": f"{script.folder}/".replace("%", "%%") + log,
        "open-mode": "append",
    }
    if script.kind == "ranks":
        # A short job is warned at half its time: warned as it starts, it would only do a step or two.
        limit = limit_s(given) or 2 * script.site.warn_s
        fixed["signal"] = f"USR2@{min(script.site.warn_s, limit // 2)}"
    if is_array:
        fixed["array"] = f"0-{script.parts - 1}" + (f"%{script.at_once}" if script.at_once else "")
    if script.site.requeue and "no-requeue" not in given:
        fixed["requeue"] = True
    return [_directive(key, value) for key, value in sorted({**fixed, **given}.items()) if value is not False]


def _directive(key: str, value: str | bool) -> str:
    if value is True:
        return f"--{key}"
    return f"--{key}={_quoted(_one_line(f'--{key}', str(value)))}"


def _quoted(value: str) -> str:
    """Quoted for sbatch, which parses #SBATCH lines itself: in double quotes, a backslash escapes what follows."""
    if re.fullmatch(r"[A-Za-z0-9._/:,@%+=-]+", value):
        return value
    return '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'


def _one_line(what: str, value: str) -> str:
    if _CONTROL.search(value):
        raise UserError(f"{what}: {value!r} has a line break or another control character in it; take it out")
    return value


def _environment(script: Script) -> str:
    """Shell lines that set up the site's software and put the snapshot of the code first on the Python path."""
    site = script.site
    lines = [f"module load {shlex.join(words.split())} || exit" for words in site.modules]
    if site.venv is not None:
        lines.append(f"source {shlex.quote(site.venv + '/bin/activate')} || exit")
    if site.conda is not None:
        lines += ['eval "$(conda shell.bash hook)"', f"conda activate {shlex.quote(site.conda)} || exit"]
    variables = dict(site.env)
    if site.interface is not None:
        variables |= {"GLOO_SOCKET_IFNAME": site.interface, "NCCL_SOCKET_IFNAME": site.interface}
    lines += [f"export {key}={shlex.quote(value)}" for key, value in variables.items()]
    code = shlex.quote(_one_line("the folder of the run", str(script.code)))
    lines += [
        f"export PYTHONPATH={code}${{PYTHONPATH:+:$PYTHONPATH}}",
        "export PYTHONSAFEPATH=1   # the code's snapshot, not what is in the working directory",
        "export PYTHONUNBUFFERED=1",
    ]
    return "\n".join(lines) + "\n"


def _launch(script: Script) -> str:
    """The command of one rank, or of one part."""
    return " ".join(shlex.quote(word) for word in [*_python(script), *script.command])


def _python(script: Script) -> list[str]:
    site = script.site
    if site.container is not None:
        box = site.container
        binds = [*box.binds, str(script.workdir), str(script.folder.parent), str(script.code)]
        flags = [*(["--nv"] if box.nv else []), *(f"--bind={bind}" for bind in binds)]
        return [box.command, "exec", *flags, box.image, box.python]
    return ["python" if site.venv or site.conda else script.python]


def _again(script: Script) -> str:
    """How a run that is not done goes on: by requeuing the job, or by a next one that is chained to it."""
    if script.kind != "ranks" or (script.site.requeue and "no-requeue" not in script.options):
        return _REQUEUE
    return _filled(
        _CHAIN,
        kept=shlex.quote(KEPT),
        of_a_job=shlex.quote(OF_A_JOB),
        folder=shlex.quote(str(script.folder)),
    )


def _filled(template: str, **texts: str) -> str:
    """The template with each {name} replaced by its text, which may itself hold names that come later."""
    for name, text in texts.items():
        template = template.replace(f"{{{name}}}", text)
    return template


def _srun_options(site: Site) -> str:
    return f" --gpu-bind={shlex.quote(site.gpu_bind)}" if site.gpu_bind is not None else ""


_RANKS = """\
{insist}
# The last task of an array has the job number of the array itself, so tasks are told apart as ARRAY_TASK.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}
first=$SLURMD_NODENAME   # the first of the nodes, where this shell and rank 0 run
{meeting}# When the time limit ends the job, in seconds since the epoch; from 23.02 on, Slurm itself sets it. It stays unset where
# there is no limit, or no answer, which `date` would read as last midnight.
if [ -z "${SLURM_JOB_END_TIME:-}" ]; then
  ends=$(SLURM_TIME_FORMAT=standard insist squeue -h -j "$job" -o %e | grep -xE '[0-9]+-[0-9-]+T[0-9:]+')
  [ -z "$ends" ] || export SLURM_JOB_END_TIME="$(date -d "$ends" +%s)"
fi
export SUBMITIT_EXECUTOR=slurm SUBMITIT_PREEMPT_SIGNAL=URG   # the run handles signals itself

trap : TERM USR1 USR2   # this shell outlives the ranks
{still_ours}
# One task a rank.
# --cpus-per-task: since Slurm 22.05, srun does not take it over from sbatch.
# --export=ALL: at some sites, srun passes on no variables unless told to.
# --kill-on-bad-exit=0 --wait=0: no rank is killed because another has exited. Ranks that stop together may exit one after
# the other, and if a node is lost, Slurm is to find that out first.
# trap: a signal must not kill a rank that cannot handle it yet.
# 76 and 77: a rank that hangs would hold the nodes, so the ranks that exited because of it have the whole step killed.
hung={hung}
rm -f "$hung"
export hung job
srun ${SLURM_CPUS_PER_TASK:+--cpus-per-task=$SLURM_CPUS_PER_TASK} --export=ALL --kill-on-bad-exit=0 --wait=0{srun} \\
  bash -c "$(declare -f insist still_ours)"'
    trap "" TERM USR1 USR2
    "$@"; code=$?
    case $code in 76|77)
      echo "$code" >> "$hung"
      still_ours && scancel --signal=KILL "$job.$SLURM_STEP_ID" ;;
    esac
    exit "$code"' -- \\
  {launch}
code=$?
# After a step was killed, srun exits with 137, as if memory had run out. The ranks noted their own codes.
[ ! -s "$hung" ] || code=$(sort "$hung" | head -n 1)
rm -f "$hung"

# 75: all ranks stopped at the same step, which is saved. Without a requeue, the job would count as finished.
# 76: the run hung after it had saved something, so it is worth another start.
if { [ "$code" -eq 75 ] || [ "$code" -eq 76 ]; } && still_ours; then
{again}fi
exit "$code"
"""
_PART = """\
job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
{insist}{still_ours}
{launch} --part "$SLURM_ARRAY_TASK_ID/{parts}"
code=$?

# Killed, because memory ran out or otherwise: up to three more tries. Complete cases are kept.
if [ "$code" -gt 128 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 3 ] && still_ours; then
{again}fi
exit "$code"
"""
_SINGLE = "{launch}\n"
_ALONE = """\
first=$(scontrol show hostnames "$SLURM_STEP_NODELIST" | head -n 1)
[ "$SLURM_PROCID" -ne 0 ] || export LDCT_PARTITION="$(insist scontrol show partition "$SLURM_JOB_PARTITION")"
"""
_INSIST = """\
insist() { for pause in 0 5 15 30; do sleep "$pause"; "$@" 2>&1 && return; done; return 1; }   # Slurm may be busy
"""
_MEETING = """\
# The address of rank 0's node as Slurm itself uses it: a node's name need not be in the DNS.
MASTER_ADDR=$(insist scontrol show node "$first" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)
MASTER_PORT=$((10000 + SLURM_JOB_ID % 20000))   # this job's own; outgoing connections have 32768 and above
export MASTER_ADDR MASTER_PORT
"""
_STILL_OURS = """\
# Whether this job is still the one to go on with the run: scancel has not ended it, and Slurm has not started it again
# elsewhere while this node was cut off. Slurm's answer is left in `now`.
still_ours() {
  now=$(insist scontrol --oneliner show job "$job") ||
    { echo "job $job is left as it is, since Slurm does not say how it stands: $now" >&2; return 1; }
  [[ $now == *" Restarts=${SLURM_RESTART_COUNT:-0} "* && $now != *" JobState=COMPLETING Reason=None "* ]]
}
"""
_REQUEUE = """\
  answer='Slurm has been told not to (Requeue=0), as `ldct-dist cancel` does'
  [[ $now == *" Requeue=0 "* ]] ||
    { trap '' TERM; answer=$(insist scontrol requeue "$job") && exit 75; }   # its TERM may come before its answer
  echo "not requeued: $answer" >&2
"""
_CHAIN = """\
  # Requeuing is not allowed: the next job is chained to this one, unless somebody has cancelled the run.
  cd {folder} || exit
  if [ "$(cat cancelled 2>/dev/null)" != "$SLURM_JOB_ID" ]; then
    # Not passed on to the next job: variables about this one, and those that sbatch puts before the script's lines.
    foreign=$(compgen -e | grep -vxE {kept} | grep -xE \\
      -e {of_a_job} \\
      -e {beaten})
    for pause in 5 15 30 0; do   # Slurm may be busy
      next=$(unset $foreign; sbatch --parsable --dependency="afterany:$job" job.sbatch) && break
      sleep "$pause"
      # Slurm may have taken the job without answering, and two jobs must not follow this one.
      next=$(squeue -h --me --name="$SLURM_JOB_NAME" -o '%A %E' | sed -n "s/ afterany:$job\\b.*//p")
      [ -z "$next" ] || break
    done
    [ -n "$next" ] || { echo "no job follows this one: submit the run again to go on" >&2; exit "$code"; }
    next=${next%%;*}
    [ ! -e "${SLURM_JOB_ID}_submitted.pkl" ] || cp "${SLURM_JOB_ID}_submitted.pkl" "${next}_submitted.pkl"
    printf '{"job": "%s"}' "$next" > next.tmp && mv next.tmp job.json
    echo "$next" > next.tmp && mv next.tmp "$SLURM_JOB_ID.next"
  fi
"""
