"""ZeRO (Rajbhandari et al. 2020) by DeepSpeed: the ranks shard what under DDP each of them holds whole.

ZeRO 1 shards the optimizer's state, the moving average and the fp32 weights, 2 the gradients as well, 3 the working
weights as well. A rank owns the same stretch of all of these.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from ldct_dist.checkpoint.load import WEIGHTS
from ldct_dist.checkpoint.pieces import Part, Piece
from ldct_dist.models.ema import decay_after
from ldct_dist.models.execution import lay_out
from ldct_dist.models.registry import Denoiser, outline
from ldct_dist.train.config import RunConfig
from ldct_dist.train.strategy.disk import Disk, folder_on_this_node, room_for
from ldct_dist.train.strategy.engine import build_adam, build_engine, on_cpu
from ldct_dist.train.strategy.parts import MOMENTS, RAW_WEIGHTS, parts_of
from ldct_dist.train.strategy.zero import Owned, zero_of
from ldct_dist.world import World

KEPT = ("average", "raw", *MOMENTS)
"""what a rank keeps for its part of each weight"""


class DeepSpeedStrategy:
    """Holds this rank's share of the network, of its moving average and of its optimizer's state.

    Under ZeRO 1, only the last micro-batch of a step reduces gradients over the ranks. Under 2 and 3 every one does, as
    no rank has room for all gradients.
    """

    def __init__(self, model: Denoiser, config: RunConfig, world: World) -> None:
        self.config, self.world = config, world
        if not config.channels_last:
            # Of activations: the weights' layout is that of DeepSpeed's flat buffers.
            model.lay_out(torch.contiguous_format)
        parameters = dict(model.named_parameters())
        self._shapes = {name: tuple(p.shape) for name, p in parameters.items()}
        self._adam = build_adam(model, config, world)
        self._engine = build_engine(model, self._adam, config, world)
        self._zero = zero_of(self._engine.optimizer)
        self._owned = {name: self._zero.owned(p) for name, p in parameters.items()}
        disk = world.on_each(self._move_to_disk)
        self._state = [_state(master, disk) for master in self._zero.masters]
        self._room: list[dict[str, torch.Tensor]] | None = None
        if disk is not None:
            self._room = [_like(state, disk) for state in self._state]
            self._adam.register_step_pre_hook(lambda *_: disk.read_ahead(self._at_hand()))
        self._adam.register_step_post_hook(self._follow)
        self._set_updates(0)

    @torch.no_grad()
    def begin(self, weights: Denoiser) -> None:
        """Train from `weights`: the average starts there, the optimizer has seen nothing yet."""
        given = weights.named_parameters()
        self.load(((file, name, p) for name, p in given for file in (WEIGHTS, RAW_WEIGHTS)), 0)

    def warm_up(self) -> None:
        """Nothing to do: ZeRO adds in the same order from the first step on."""

    def __call__(self, hu: torch.Tensor) -> torch.Tensor:
        """The network on float32 HU (b, 1, z, y, x), in the precision of the run."""
        return self._engine(hu)

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Around the forward and backward of one micro-batch."""
        self._engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: torch.Tensor) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)

    def clip(self) -> torch.Tensor:
        """The gradient's L2 norm over all ranks, a scalar; `step` scales it down to optim.clip_norm."""
        return self._zero.norm()

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Apply the gradients to the weights, and update the average."""
        for group in self._adam.param_groups:
            group["lr"] = lr
        self._engine.step()
        self.updates += 1

    def forget_gradients(self) -> None:
        self._zero.drop_gradients()

    @property
    @torch.no_grad()
    def averaged(self) -> Denoiser:
        """The network with the averaged weights, whole on every rank, gathered parameter by parameter."""
        model = outline(self.config.model).to_empty(device=self.world.device)
        for name, parameter in model.named_parameters():
            whole = torch.zeros(parameter.numel(), device=self.world.device)
            if (owned := self._owned[name]) is not None:
                whole[owned.start :][: owned.count] = self._values(owned, "average")
            parameter.copy_(self.world.sum(whole).view_as(parameter))
        lay_out(model, self.config.channels_last)
        return model.requires_grad_(False).eval()

    def parts(self, step: int) -> dict[str, Part]:
        """The files of a checkpoint, with this rank's pieces of their tensors."""
        average, raw, *moments = ({name: self._piece(name, key) for name in self._shapes} for key in KEPT)
        by_moment = {
            f"{name}/{key}": piece
            for key, pieces in zip(MOMENTS, moments, strict=True)
            for name, piece in pieces.items()
        }
        return parts_of(average, raw, by_moment, self.config.model, step, self.world.size)

    @torch.no_grad()
    def load(self, tensors: Iterable[tuple[str, str, torch.Tensor]], updates: int) -> None:
        """Load this rank's part of each (file, name, whole tensor)."""
        for state in self._state:
            for key in MOMENTS:
                state[key].zero_()  # a checkpoint of step 0 has none
        for file, name, tensor in tensors:
            if file in (WEIGHTS, RAW_WEIGHTS):
                key = "average" if file == WEIGHTS else "raw"
            else:
                name, key = name.rsplit("/", 1)
            if (owned := self._owned[name]) is not None:
                self._values(owned, key).copy_(tensor.reshape(-1)[owned.start :][: owned.count])
        self._set_updates(updates)
        self._zero.spread()

    def _move_to_disk(self) -> Disk | None:
        """Move to a disk what the config wants there; the disk, if the optimizer's state is to be on it.

        Raises UserError if the disk has no room for it.
        """
        zero, places = self._zero, self.config.deepspeed
        optimizer, parameters = (place == "nvme" for place in (places.optimizer, places.parameters))
        if not optimizer and not parameters:
            return None
        # For each master: all that is KEPT, a copy of that for saving, and the gradient.
        needed = (2 * len(KEPT) + 1) * room_for(*zero.masters) if optimizer else 0
        needed += room_for(*zero.working) if parameters else 0
        disk = Disk(folder_on_this_node(places.nvme_path), needed)
        if parameters:
            zero.move_working(disk)
        if optimizer:
            zero.move_masters(disk)
        return disk if optimizer else None

    def _at_hand(self) -> list[dict[str, torch.Tensor]]:
        """The state of those masters that Adam steps now: ZeRO 3 may step one after the other."""
        given = {id(master) for group in self._adam.param_groups for master in group["params"]}
        pairs = zip(self._zero.masters, self._state, strict=True)
        return [state for master, state in pairs if id(master) in given]

    def _follow(self, *_: object) -> None:
        """Update the average of what Adam has just stepped, while it is still in memory."""
        decay = decay_after(self.updates, self.config.optim.ema)
        for state in self._at_hand():
            state["average"].lerp_(state["raw"], 1 - decay)

    def _set_updates(self, updates: int) -> None:
        """Steps applied so far: what Adam's bias correction and the average's decay depend on."""
        self.updates = updates
        for master, state in zip(self._zero.masters, self._state, strict=True):
            step = updates if on_cpu(self._adam) else torch.tensor(float(updates), device=master.device)
            self._adam.state[master] = {"step": step, **{key: state[key] for key in MOMENTS}}

    def _values(self, owned: Owned, key: str) -> torch.Tensor:
        return _of(self._state, owned, key)

    def _piece(self, name: str, key: str) -> Piece:
        owned = self._owned[name]
        if owned is None:
            return Piece(self._shapes[name], 0, torch.empty(0))
        room = None if self._room is None else _of(self._room, owned, key)
        return Piece(self._shapes[name], owned.start, self._values(owned, key), room)


def _of(state: list[dict[str, torch.Tensor]], owned: Owned, key: str) -> torch.Tensor:
    return state[owned.master][key].narrow(0, owned.place, owned.count)


def _state(master: torch.Tensor, disk: Disk | None) -> dict[str, torch.Tensor]:
    """A master, which is a flat stretch of the fp32 weights, and tensors like it for the rest of KEPT; on `disk` if the
    master is there."""
    raw = master.detach()
    empty_like = torch.empty_like if disk is None else disk.empty_like
    beside = {key: empty_like(raw).zero_() for key in MOMENTS}
    return {"raw": raw, "average": empty_like(raw).copy_(raw), **beside}


def _like(state: dict[str, torch.Tensor], disk: Disk) -> dict[str, torch.Tensor]:
    return {key: disk.empty_like(tensor) for key, tensor in state.items()}
