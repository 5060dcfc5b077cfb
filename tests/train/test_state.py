"""Counters of a run."""

from __future__ import annotations

from ldct_dist.train.state import TrainState

FEW, ALL = {"cases": 2}, {"cases": 9}


def test_a_score_is_the_best_among_those_of_its_basis():
    state = TrainState("store")
    told = [
        state.note_validation(*given)
        for given in ((8.0, FEW), (9.0, FEW), (14.0, ALL), (12.0, ALL), (7.0, FEW))
    ]
    assert told == [True, False, True, True, True]
    state.pass_over_validation()
    assert (state.is_validated, state.best, state.basis) == (True, 7.0, FEW)


def test_counters_of_a_version_without_basis_are_read_and_their_best_is_not_compared_with():
    state = TrainState("store", step=4)
    state.note_validation(8.0, FEW)
    counters = state.counters()
    assert TrainState.of(counters) == state
    del counters["basis"]
    old = TrainState.of(counters)
    assert (old.best, old.is_validated) == (8.0, True)
    assert old.note_validation(9.0, FEW)
