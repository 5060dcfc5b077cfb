"""What the ranks tell each other in every step, so that all of them act alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ldct_dist.world import World


@dataclass(frozen=True)
class Agreed:
    """What every rank knows of a step once its gradients are there, the same on all of them."""

    loss: float
    """mean over the global batch"""
    norm: float
    """L2 norm of the gradient before clipping"""
    finite: bool
    """whether loss and gradient are finite on every rank"""
    to_stop: bool
    """whether any rank asks to stop"""
    damaged: bool
    """whether any rank's data is damaged"""


def agree(world: World, losses: torch.Tensor, norm: torch.Tensor, to_stop: bool, damaged: bool) -> Agreed:
    """All ranks call it together: one all-reduce, and one wait for the GPU.

    losses: of this rank's crops, (b,). norm: the gradient's over all ranks, which all of them have already. to_stop,
    damaged: of this rank.
    """
    finite = losses.isfinite().all() & norm.isfinite()
    flags = (losses.new_full((), flag) for flag in (to_stop, damaged))
    mine = torch.stack([n.double() for n in (losses.double().mean(), finite, *flags)])
    # The sum of a flag is the number of ranks that raise it. The norm is not summed: it comes along to be waited for once.
    told = torch.cat((world.sum(mine), norm.to(mine).view(1)))
    loss, finite_ranks, stopping_ranks, damaged_ranks, gradient = told.tolist()
    return Agreed(
        loss=loss / world.size,
        norm=gradient,
        finite=finite_ranks == world.size,
        to_stop=stopping_ranks > 0,
        damaged=damaged_ranks > 0,
    )
