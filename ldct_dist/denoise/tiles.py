"""Whole volumes in tiles that fit together exactly: no seams, no blending, and memory bounded by the tile.

A network states its receptive field. A tile is read with a halo of at least that, aligned to the network's stride. At
the volume's border a tile ends, so that convolutions put their zeros beyond the border where they would put them for the
whole volume. Each output voxel is then what the whole volume at once would have given.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch

from ldct_dist.ct.volume import AIR_HU, padding_of
from ldct_dist.errors import UserError
from ldct_dist.models.execution import autocast
from ldct_dist.models.registry import Denoiser

Triple = tuple[int, int, int]
Slices = tuple[slice, slice, slice]
Progress = Callable[[int, int], None]
Finish = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

TILES: dict[str, tuple[Triple, ...]] = {
    "cpu": ((32, 256, 256),),
    "cuda": (*((z, 512, 512) for z in (256, 160, 96, 64, 32)), (32, 256, 256), (16, 128, 128)),
}
"""Output voxels (z, y, x) of a tile, by device; the first that memory allows is taken. The larger the tile, the smaller
the share of its halo, and whole slices need none in plane. With its halo, (32, 256, 256) is 52 x 352 x 352, which is 3 GB
for one activation of size xl in fp32."""
HU_RANGE = (AIR_HU, 32767)
NOT_FINITE = -32768
"""stands for an output that is not finite, among outputs in HU"""
FEW_ENOUGH = 2**31
"""elements of one tensor: for more, cuDNN takes other kernels, which are slower and have been faulty in some versions"""
AT_ONCE = 2
"""tensors of the network's largest size that exist at the same time, at least; tiles that are too large for so many
are not tried"""


class NotFiniteError(UserError):
    """The network's answer is not finite."""


@dataclass(frozen=True)
class Tile:
    """read: the part of the volume that the network is given. keep: the part of its output that is written to `write`."""

    read: Slices
    keep: Slices
    write: Slices


def tiles(shape: Triple, tile: Triple, radius: Triple, stride: Triple) -> list[Tile]:
    """Tiles that cover a volume of `shape`, a multiple of `stride`, and write each voxel once.

    tile: output voxels of a tile, rounded up to multiples of `stride`. radius: of the network.
    """
    axes = [
        _spans(size, _up(edge, s), _up(r, s))
        for size, edge, r, s in zip(shape, tile, radius, stride, strict=True)
    ]
    return [Tile(*zip(*spans, strict=True)) for spans in product(*axes)]


def denoise_volume(
    model: Denoiser,
    hu: np.ndarray,
    *,
    tile: Triple | None = None,
    device: torch.device | str | None = None,
    bf16: bool = False,
    strength: float = 1.0,
    progress: Progress = lambda done, total: None,
) -> np.ndarray:
    """`model` on a whole volume: int16 HU (z, y, x) in and out, rounded to the nearest HU.

    strength: share of what the network changes, above 0 and up to 1; less leaves some of the noise, and what it hides.
    Padding, as `padding_of` finds it, stays as it is. `tile`: None takes what suits the device. `device`: where the
    model is, or shall be moved; None leaves it there. `progress` hears (tiles done, tiles in all).
    Raises NotFiniteError where the network's answer is not finite, and UserError where `hu` is something else.
    """
    if not (isinstance(hu, np.ndarray) and hu.ndim == 3 and hu.dtype == np.int16):
        got = f"{hu.dtype} {hu.shape}" if isinstance(hu, np.ndarray) else type(hu).__name__
        raise UserError(f"denoise_volume: takes int16 HU (z, y, x), not {got}; for a Volume, give its hu")
    refuse_strength(strength)

    def in_hu(given: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
        if strength < 1:
            answer = torch.lerp(given, answer, strength)
        whole = answer.round().clamp(*HU_RANGE)
        return torch.where(answer.isfinite(), whole, NOT_FINITE).to(torch.int16)

    out = np.empty_like(hu)
    with ThreadPoolExecutor(1) as beside:
        padding = beside.submit(padding_of, hu)  # while a GPU works
        for write, answer in denoised_tiles(
            model, hu, tile=tile, device=device, bf16=bf16, finish=in_hu, progress=progress
        ):
            out[write] = answer.numpy()
            if out[write].min() == NOT_FINITE:
                raise NotFiniteError(
                    f"{model.config.label} gives values that are not finite; take the weights "
                    f"of an earlier checkpoint{', or do without bf16' if bf16 else ''}"
                )
        np.copyto(out, hu, where=padding.result())
    return out


def refuse_strength(strength: float) -> None:
    """Raises UserError unless `strength` is above 0 and at most 1."""
    if not 0 < strength <= 1:
        raise UserError(f"strength {strength:g}: give a share above 0 and up to 1")


def denoised_tiles(
    model: Denoiser,
    hu: np.ndarray,
    *,
    tile: Triple | None = None,
    device: torch.device | str | None = None,
    bf16: bool = False,
    finish: Finish = lambda given, answer: answer,
    progress: Progress = lambda done, total: None,
) -> Iterator[tuple[Slices, torch.Tensor]]:
    """(where in the volume a tile belongs, the network's output there on the CPU) for each tile.

    The output is float HU, or what `finish`, called on the device, makes of the tile's input and of it.
    """
    if device is not None:
        model.to(device)
    missing = [(0, -n % s) for n, s in zip(hu.shape, model.stride, strict=True)]
    padded = np.pad(hu, missing, constant_values=AIR_HU) if any(map(any, missing)) else hu
    work = _Work(model, padded, bf16, finish)
    training = model.training
    model.eval()
    try:
        # The next tile is started before this one's output is waited for, so that a GPU always has work.
        cut, ahead = work.begin(tile)
        for done, t in enumerate(cut, start=1):
            answer = ahead
            if done < len(cut):
                ahead = work.start(cut[done])
            inside = hu[t.write].shape  # without what was only added to fill up the stride
            yield t.write, answer.wait()[tuple(map(slice, inside))]
            progress(done, len(cut))
    finally:
        model.train(training)


@dataclass(frozen=True)
class _Work:
    """A volume, padded to multiples of the stride, and what its tiles are denoised by."""

    model: Denoiser
    padded: np.ndarray
    bf16: bool
    finish: Finish

    def begin(self, tile: Triple | None) -> tuple[list[Tile], _Answer]:
        """The largest tiles that fit into memory, and the output for the first, which is the largest of them."""
        model, device = self.model, next(self.model.parameters()).device
        sizes = (tile,) if tile is not None else TILES[device.type]
        for size in sizes:
            cut = sorted(
                tiles(self.padded.shape, size, model.radius, model.stride), key=_voxels, reverse=True
            )
            if device.type == "cuda" and size != sizes[-1] and _too_large(cut[0], model, self.bf16):
                continue
            with _memory_running_out():
                return cut, self.start(cut[0])
            torch.cuda.empty_cache()
        raise UserError(
            f"{model.config.label} does not fit the memory of {device} even in tiles of "
            f"{size}: take another device, or a smaller tile"
        )

    def start(self, t: Tile) -> _Answer:
        weight = next(self.model.parameters())
        # Contiguous and pinned, or the copy to a GPU would first make another one that is not pinned.
        given = torch.empty(self.padded[t.read].shape, dtype=torch.int16, pin_memory=weight.is_cuda)
        given.numpy()[:] = self.padded[t.read]
        given = given.to(weight.device, non_blocking=True)
        with torch.inference_mode(), autocast(weight.device, self.bf16):
            given = given.to(weight.dtype)
            return _Answer(self.finish(given[t.keep], self.model(given[None, None])[0, 0][t.keep]))


@contextmanager
def _memory_running_out() -> Iterator[None]:
    """Ends the block quietly if a GPU's memory runs out. cuDNN has words of its own for it, if none of its algorithms has
    room."""
    try:
        yield
    except torch.OutOfMemoryError:
        return
    except RuntimeError as e:
        if "unable to find an engine" not in str(e):
            raise


def _too_large(largest: Tile, model: Denoiser, bf16: bool) -> bool:
    """Whether a tile cannot fit into a GPU's memory, or would be slow there."""
    weight = next(model.parameters())
    numbers = _voxels(largest) * model.widest
    needed = AT_ONCE * numbers * (2 if bf16 else weight.element_size())
    return numbers >= FEW_ENOUGH or needed > _room(weight.device)


def _room(device: torch.device) -> int:
    """Bytes of a GPU that are free, or reserved by torch but not in use."""
    taken = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + taken


def _voxels(t: Tile) -> int:
    return math.prod(s.stop - s.start for s in t.read)


class _Answer:
    """An output on its way to the CPU."""

    def __init__(self, answer: torch.Tensor) -> None:
        self._arrived = None
        if answer.is_cuda:
            self._host = torch.empty(answer.shape, dtype=answer.dtype, pin_memory=True)
            self._host.copy_(answer, non_blocking=True)
            self._arrived = torch.cuda.current_stream(answer.device).record_event()
        else:
            self._host = answer

    def wait(self) -> torch.Tensor:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _spans(size: int, edge: int, halo: int) -> list[Slices]:
    """(read, keep, write) of each tile along one axis."""
    spans = []
    for start in range(0, size, edge):
        stop = min(start + edge, size)
        first, last = max(0, start - halo), min(size, stop + halo)
        spans.append((slice(first, last), slice(start - first, stop - first), slice(start, stop)))
    return spans
