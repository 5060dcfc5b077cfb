"""A node that is lost, a cable that is cut, a rank that hangs: the run comes to its end by itself, bit for bit."""

from __future__ import annotations

import os
import signal

import pytest
from jobs_of import Trial, field, ranks_on, wait

from runs import same

pytestmark = [pytest.mark.slurm, pytest.mark.usefixtures("user_of")]


@pytest.mark.parametrize("node", [1, 0], ids=["a worker", "the node of the job script"])
def test_a_node_is_powered_off(machines, store, unbroken, tmp_path, node):
    trial = Trial(machines, store, tmp_path)
    trial.comes_to(30)
    lost = trial.nodes()[node]
    machines.order("power_off", lost)
    trial.ends()
    machines.order("power_on", lost)
    assert trial.restarts == 1
    assert same(trial.run, unbroken)


def test_a_cable_is_cut_in_silence_and_healed(machines, store, unbroken, tmp_path):
    trial = Trial(machines, store, tmp_path)
    trial.comes_to(30)
    cut = trial.nodes()[0]  # rank 0 lives on there, beside the new one
    machines.order("cut", cut)
    wait(lambda: trial.restarts == 1, "requeued")
    wait(lambda: field(machines, trial.job.job_id, "JobState") == "RUNNING", "running again")
    assert ranks_on(machines, cut)
    machines.order("heal", cut)
    trial.ends()
    assert trial.restarts == 1
    assert same(trial.run, unbroken)
    wait(lambda: not ranks_on(machines, cut), "the old ranks' end")


@pytest.mark.parametrize(
    ("fate", "line"),
    [(signal.SIGSTOP, "no answer for 8 s from rank 2 on node{}"), (signal.SIGKILL, "another rank is gone (")],
    ids=["hang", "are killed"],
)
def test_ranks_of_a_node(machines, store, unbroken, tmp_path, fate, line):
    """The others say so and leave; those that hang cannot leave, but keep the job from nothing."""
    trial = Trial(machines, store, tmp_path, hang_s=8.0)
    trial.comes_to(30)
    node = trial.nodes()[1]
    for pid in ranks_on(machines, node):
        os.kill(pid, fate)
    trial.ends()
    assert trial.restarts == 1
    assert line.format(node) in trial.job.log.read_text()
    assert same(trial.run, unbroken)
