"""What a job script does when it runs, with Slurm's commands, and the ranks', replaced."""

from __future__ import annotations

import re
import socket
import subprocess
from datetime import datetime
from pathlib import Path

import pytest

from commands import commands_on_path
from ldct_dist.cluster.sbatch import Script, render
from ldct_dist.cluster.site import Site

OURS = "JobState=RUNNING Reason=None Restarts=0 NodeAddr=10.0.0.1 "
DEADLINE = "2030-01-02T03:04:05"
EPOCH = f"{datetime.fromisoformat(DEADLINE).timestamp():.0f}"
DOWN = "echo slurm_load_jobs error: Unable to contact slurm controller >&2; exit 1"


class Job:
    """A job script in a folder of its own. run: with these commands in place of the usual ones."""

    def __init__(self, folder, **changes) -> None:
        self.folder = folder
        script = Script(
            "run",
            ["train"],
            folder / "code",
            folder,
            folder,
            "rank",
            **{"options": {"time": "60"}, **changes},
        )
        (folder / "job.sbatch").write_text(render(script))

    def run(self, environment=None, **commands) -> subprocess.CompletedProcess:
        usual = {
            "scontrol": f"echo '{OURS}'; echo scontrol $1 >> {self.folder}/calls",
            "squeue": "",
            "sbatch": f"echo sbatch >> {self.folder}/calls; echo 8",
            "scancel": f"echo scancel $1 >> {self.folder}/calls",
            "srun": f'echo srun "$@" >> {self.folder}/calls; while [ "$1" != bash ]; do shift; done; exec "$@"',
            "rank": "exit 0",
            "sleep": "",
        }
        job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "run", "SLURMD_NODENAME": "n1", "SLURM_STEP_ID": "0"}
        path = commands_on_path(self.folder / "bin", **usual | commands)
        return subprocess.run(
            ["bash", self.folder / "job.sbatch"],
            env={"PATH": path, **job, **(environment or {})},
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )

    def calls(self, command: str) -> list[str]:
        return [line for line in self.said("calls").splitlines() if line.startswith(command)]

    def said(self, name: str) -> str:
        return (self.folder / name).read_text().strip()


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


@pytest.fixture
def chained(tmp_path):
    """A job that goes on in another one, and whose ranks have saved and stopped."""
    return Job(tmp_path, site=Site(requeue=False))


@pytest.mark.parametrize(
    ("answer", "deadline"),
    [
        (f"echo {DEADLINE}", EPOCH),
        (f"[ -e asked ] || {{ touch asked; {DOWN}; }}; echo {DEADLINE}", EPOCH),
        ("", "none"),
        ("echo N/A", "none"),
        ("echo NONE", "none"),
        (DOWN, "none"),
    ],
    ids=["told", "told when asked again", "nothing", "no limit", "never", "no Slurm"],
)
def test_the_deadline_is_what_slurm_says_or_none(job, answer, deadline):
    """Not midnight, which is what date takes no answer for."""
    done = job.run(squeue=answer, rank=f"echo ${{SLURM_JOB_END_TIME:-none}} > {job.folder}/deadline")
    assert done.returncode == 0, done.stderr
    assert job.said("deadline") == deadline


def test_a_deadline_that_slurm_has_set_stays(job):
    job.run(
        {"SLURM_JOB_END_TIME": "1900000000"},
        squeue=f"echo {DEADLINE}",
        rank=f"echo $SLURM_JOB_END_TIME > {job.folder}/deadline",
    )
    assert job.said("deadline") == "1900000000"


def test_srun_hands_on_what_the_script_has_set(job):
    """At some sites it does not, unless it is told to."""
    job.run({"SLURM_EXPORT_ENV": "NONE"})
    assert "--export=ALL" in job.calls("srun")[0].split(" bash ")[0].split()


def killed(code: int) -> dict[str, str]:
    """Ranks that leave with this code, and the rest of the step killed."""
    return {
        "rank": f"exit {code}",
        "srun": 'while [ "$1" != bash ]; do shift; done; "$@"; exit 137',
    }


def test_after_a_hang_the_job_is_requeued(job):
    assert job.run(**killed(76)).returncode == 75
    assert job.calls("scancel") == ["scancel --signal=KILL"]
    assert job.calls("scontrol requeue")


def test_a_requeue_that_ends_the_job_before_slurm_answers_counts_as_done(job):
    """Slurm may end all that runs in the job, what asks for it included, before that has its answer."""
    done = job.run(rank="exit 75", scontrol=f"echo '{OURS}'; [ $1 != requeue ] || kill $PPID $$")
    assert (done.returncode, done.stderr) == (75, "")


def test_what_was_cancelled_leaves_its_nodes_at_once(job):
    """`ldct-dist cancel` has told Slurm to requeue the job no more, which would refuse that as often as it is asked."""
    slurm = f"echo '{OURS} Requeue=0 '; echo scontrol $1 >> {job.folder}/calls"
    done = job.run(rank="exit 75", scontrol=slurm)
    assert done.returncode == 75
    assert not job.calls("scontrol requeue")
    assert "not requeued: Slurm has been told not to (Requeue=0)" in done.stderr


def test_a_hang_before_anything_was_saved_ends_with_77(job):
    done = job.run(**killed(77))
    assert done.returncode == 77
    assert job.calls("scancel") == ["scancel --signal=KILL"]
    assert not job.calls("scontrol requeue")


def test_one_rank_that_knows_of_a_checkpoint_is_enough(job):
    twice = 'while [ "$1" != bash ]; do shift; done; "$@"; "$@"; exit 137'
    done = job.run(rank="[ -e first ] && exit 77; touch first; exit 76", srun=twice)
    assert done.returncode == 75
    assert job.calls("scontrol requeue")


def test_killed_for_want_of_memory_it_is_what_it_was(job):
    assert job.run(srun="exit 137").returncode == 137
    assert not job.calls("scontrol requeue")


def test_a_job_that_slurm_does_not_know_how_it_stands_says_so(job):
    answer = (
        f'[ "$2" = show ] && [ "$3" = job ] && {{ {DOWN}; }}; echo "{OURS}"; echo "$@" >> {job.folder}/calls'
    )
    done = job.run(rank="exit 75", scontrol=answer)
    assert done.returncode == 75
    assert "job 7 is left as it is" in done.stderr
    assert "Unable to contact slurm controller" in done.stderr
    assert not job.calls("requeue")


def test_the_next_job_is_told_nothing_of_this_one(chained):
    environment = {
        **{"SLURM_JOB_END_TIME": "1900000000", "SLURM_CPU_BIND": "x", "SRUN_DEBUG": "3", "PMI_RANK": "0"},
        **{"RANK": "0", "SBATCH_TIMELIMIT": "1", "SBATCH_ACCOUNT": "radiology", "SLURM_CONF": "/here"},
    }
    done = chained.run(environment, rank="exit 75", sbatch=f'echo "$@" > {chained.folder}/words; env; echo 8')
    assert done.returncode == 75, done.stderr
    names = {line.partition("=")[0] for line in chained.said("7.next").splitlines()}
    told = [name for name in names if name.startswith(("SLURM", "SBATCH", "SRUN", "PMI", "MASTER", "RANK"))]
    assert sorted(told) == ["SBATCH_ACCOUNT", "SLURM_CONF"]
    assert chained.said("words") == "--parsable --dependency=afterany:7 job.sbatch"


def test_the_next_job_is_asked_for_again_when_slurm_is_busy(chained):
    busy = f'[ -e asked ] || {{ touch asked; {DOWN}; }}; echo "a warning" >&2; echo "8;here"'
    done = chained.run(rank="exit 75", sbatch=busy)
    assert done.returncode == 75
    assert chained.said("7.next") == "8"
    assert chained.said("job.json") == '{"job": "8"}'
    assert "a warning" in done.stderr


def test_a_next_job_that_slurm_took_in_silence_is_not_asked_for_again(chained):
    queued = 'case $* in *%E*) echo "5 (null)"; echo "6 afterany:70(unfulfilled)"; echo "9 afterany:7(unfulfilled)";; esac'
    timed_out = f"echo sbatch >> {chained.folder}/calls; echo Socket timed out >&2; exit 1"
    done = chained.run(rank="exit 75", sbatch=timed_out, squeue=queued)
    assert done.returncode == 75
    assert chained.calls("sbatch") == ["sbatch"]
    assert chained.said("7.next") == "9"


def test_a_job_that_nothing_follows_says_so(chained):
    done = chained.run(rank="exit 75", sbatch=f"echo sbatch >> {chained.folder}/calls; {DOWN}")
    assert done.returncode == 75
    assert len(chained.calls("sbatch")) == 4
    assert "no job follows this one: submit the run again" in done.stderr
    assert not (chained.folder / "7.next").exists()


SLURM = Path(__file__).parents[2] / "slurm"


def software(folder, **commands) -> dict[str, str]:
    """An environment as bare as a job's may be, in a folder whose .venv has these commands."""
    activate = folder / ".venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.write_text(f"PATH={commands_on_path(folder / 'bin', **commands)}\n")
    return {
        "PATH": "/usr/bin:/bin",
        "SLURM_JOB_ID": "7",
        "SLURM_SUBMIT_HOST": "login",
        "SLURM_JOB_USER": "me",
    }


def test_tensorboard_tells_the_way_to_it_where_no_user_is_named(tmp_path):
    environment = software(tmp_path, tensorboard='echo "$@"')
    done = subprocess.run(
        ["bash", SLURM / "tensorboard.sbatch", "runs"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"ssh -N -L 10007:localhost:10007 -J me@login me@{socket.gethostname()}" in done.stdout
    assert "--logdir runs --host localhost --port 10007" in done.stdout


def test_the_finalise_that_the_script_to_copy_names_runs_in_the_shell_of_wrap(tmp_path):
    """Which is sh: on Debian, it knows no `source`."""
    environment = software(tmp_path, **{"ldct-dist": 'echo "$@"'})
    (command,) = re.findall(r'--wrap "(.*)"', (SLURM / "ingest.sbatch").read_text())
    done = subprocess.run(
        ["/bin/sh", "-c", command], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("finalise /scratch/ct.zarr\n", "")
