"""Where DeepSpeed's three ZeRO optimizers keep what this rank owns. Only this module depends on their internals.

Each keeps flat fp32 master weights, of which every rank owns a stretch that its Adam updates, and working weights in the
precision of the run, which are made from the stretches of all ranks. (DeepSpeed 0.19: runtime/zero/stage_1_and_2.py,
runtime/zero/stage3.py, and runtime/bf16_optimizer.py, which is ZeRO 1 in bf16.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ldct_dist.train.strategy.disk import Disk


@dataclass(frozen=True)
class Owned:
    """`count` elements of a parameter, from its `start`-th on in C order, which are in master number `master` from its
    `place`-th element on."""

    master: int
    place: int
    start: int
    count: int


class Zero(Protocol):
    """What this package needs of one of the three."""

    masters: list[torch.Tensor]
    working: Sequence[torch.Tensor]
    """this rank's share of the working weights under ZeRO 3; empty below it, where a rank has all of them"""

    def move_masters(self, disk: Disk) -> None:
        """Move the masters, and the gradients that a step uses, from memory to `disk`."""

    def move_working(self, disk: Disk) -> None:
        """Move the working weights from memory to `disk`."""

    def owned(self, parameter: Any) -> Owned | None:
        """The part of `parameter` that this rank owns, if any."""

    def norm(self) -> torch.Tensor:
        """The gradient's L2 norm over all ranks, by which `step` clips; not finite where the gradient is not."""

    def drop_gradients(self) -> None:
        """Drop the gradients without a step."""

    def spread(self) -> None:
        """Set the working weights of all ranks from the masters."""


def zero_of(optimizer: Any) -> Zero:
    """The adapter for DeepSpeed's `engine.optimizer`."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        return _Stage3(optimizer)
    return _Stage1Bf16(optimizer) if isinstance(optimizer, BF16_Optimizer) else _Stage12(optimizer)


def _move(masters: list[torch.Tensor], disk: Disk) -> None:
    for master in masters:
        gradient = master.grad
        assert gradient is not None  # with the optimizer on the CPU, masters always have one
        master.data, master.grad = disk.moved(master), disk.moved(gradient)


class _Linked:
    """ZeRO 1 and 2, where DeepSpeed notes on each parameter what this rank owns of it."""

    working: Sequence[torch.Tensor] = ()

    def move_working(self, disk: Disk) -> None:
        pass

    def owned(self, parameter: Any) -> Owned | None:
        link = parameter._hp_mapping
        if link is None:
            return None
        given, kept = link.lp_fragment_address, link.hp_fragment_address
        return Owned(link.param_group_index, kept.start, given.start, kept.numel)


class _Stage12(_Linked):
    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self.masters = optimizer.single_partition_of_fp32_groups

    def move_masters(self, disk: Disk) -> None:
        _move(self.masters, disk)
        self._optimizer._link_all_hp_params()  # or the old links would keep the memory in use

    def norm(self) -> torch.Tensor:
        return self._optimizer.scaled_global_norm()

    def drop_gradients(self) -> None:
        zero = self._optimizer
        zero.zero_grad()
        zero.micro_step_id = -1
        zero._release_preflattened_grad_buffers()
        for group in range(len(self.masters)):
            zero.averaged_gradients[group] = zero.all_grad_tensors[group] = None
        if zero.cpu_offload:
            zero.reset_cpu_buffers()

    def spread(self) -> None:
        self._optimizer.update_lp_params()


class _Stage1Bf16(_Linked):
    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self.masters = optimizer.fp32_groups_flat_partition

    def move_masters(self, disk: Disk) -> None:
        raise AssertionError("with its optimizer elsewhere than on the GPU, DeepSpeed takes _Stage12")

    def norm(self) -> torch.Tensor:
        from deepspeed.runtime.utils import get_global_norm_of_tensors

        gradients, _ = self._optimizer.get_grads_for_norm()
        norm = get_global_norm_of_tensors(gradients)
        return torch.where(norm < 0, torch.inf, norm)  # -1 stands for one that is not finite

    def drop_gradients(self) -> None:
        self._optimizer.zero_grad()

    def spread(self) -> None:
        self._optimizer.update_lp_params()


class _Stage3:
    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self.masters = optimizer.fp32_partitioned_groups_flat
        self.working: Sequence[torch.Tensor] = optimizer.fp16_partitioned_groups_flat

    def move_masters(self, disk: Disk) -> None:
        _move(self.masters, disk)

    def move_working(self, disk: Disk) -> None:
        zero = self._optimizer
        for group, flat in enumerate(self.working):
            flat.data = disk.moved(flat)
            zero._unflatten_partitioned_parameters(group)
        zero.param_groups_fp16_flat_cpu_memory.clear()

    def owned(self, parameter: Any) -> Owned | None:
        zero = self._optimizer
        master, place, share = zero.grad_position[zero.get_param_id(parameter)]
        start = share * zero._get_param_partition_rank(parameter)
        count = min(share, parameter.ds_numel - start)  # the last shares are padded
        return Owned(master, place, start, count) if count > 0 else None

    def norm(self) -> torch.Tensor:
        from deepspeed.runtime.utils import combine_grad_norm_groups

        return combine_grad_norm_groups(self._optimizer._get_norm_groups())

    def drop_gradients(self) -> None:
        self._optimizer._overflow_clean_up(1.0)

    def spread(self) -> None:
        zero = self._optimizer
        zero._partition_all_parameters()
        for group in range(len(self.masters)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        zero._post_step(set())
