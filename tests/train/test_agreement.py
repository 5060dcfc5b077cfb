"""What ranks tell each other in a step, without processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch

from ldct_dist.train.agreement import Agreed, agree
from ldct_dist.world import World


@dataclass(frozen=True)
class Beside(World):
    """A rank beside others, which have said `others`. said: what it says itself."""

    others: Sequence[torch.Tensor] = ()
    said: list[torch.Tensor] = field(default_factory=list)

    def sum(self, tensor):
        self.said.append(tensor.clone())
        return sum(self.others, tensor)


def agreed(*ranks, norm=3.0) -> Agreed:
    """What the first of these ranks makes of what all say; a rank: (losses, to stop, damaged)."""
    said: list[torch.Tensor] = []
    for losses, to_stop, damaged in (*ranks[1:], ranks[0]):
        world = Beside(size=len(ranks), others=said)
        found = agree(world, torch.tensor(losses), torch.tensor(norm), to_stop, damaged)
        said = [*said, *world.said]
    return found


FINE = ([1.0, 3.0], False, False)


def test_the_loss_is_the_mean_over_all_crops_and_the_norm_stays():
    assert agreed(FINE, ([5.0, 6.0], False, False)) == Agreed(3.75, 3.0, True, False, False)
    assert agreed(FINE) == Agreed(2.0, 3.0, True, False, False)


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize(("to_stop", "damaged"), [(True, False), (False, True), (True, True)])
def test_one_rank_that_asks_is_enough(rank, to_stop, damaged):
    ranks = [FINE, FINE, FINE]
    ranks[rank] = ([1.0, 3.0], to_stop, damaged)
    found = agreed(*ranks)
    assert (found.to_stop, found.damaged, found.finite) == (to_stop, damaged, True)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_on_one_rank_is_known_to_all(rank, loss):
    ranks = [FINE, FINE]
    ranks[rank] = ([1.0, loss], False, False)
    found = agreed(*ranks)
    assert not found.finite
    assert not math.isfinite(found.loss)


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_told_where_the_losses_are(norm):
    found = agreed(FINE, FINE, norm=norm)
    assert not found.finite
    assert found.loss == 2.0


def test_losses_are_averaged_in_double_precision():
    """In float32, the ranks' sum would be rounded, otherwise for other numbers of ranks."""
    losses = [2.0**24, 1.0]
    assert agreed((losses, False, False), (losses, False, False)).loss == (2**24 + 1) / 2
