"""RED-CNN as published, slice by slice, and a plain loop that trains it.

Chen et al., IEEE Trans Med Imaging 36 (2017): five 5 x 5 convolutions of 96 filters without padding, five
deconvolutions, three shortcuts, ReLU; mean square error, Adam, patches of 55 x 55, weights drawn with 0.01. Its
learning rate falls whenever validation stands still, and the plateau is reached when the last one brings no more.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ldct_dist.ct.volume import Volume, padding_of
from ldct_dist.store.layout import FULL_DOSE, dose_name
from ldct_dist.store.reader import Store

_FILTERS, _PATCH, _BATCH = 96, 55, 8
_RATES = (3e-4, 6e-5)
_UNIT_HU = 1024.0  # images enter as HU / 1024: bf16 keeps most digits of what is near water
_AVERAGE = 0.99  # decay of the moving average of the weights, which is what is validated and kept
_EVERY = 250  # steps between validations
_PATIENCE = 3  # validations without a better one, after which the rate falls
_BETTER = 0.998  # of the least error so far is better
_VALIDATED, _FIELD = 10, 256  # slices of a validation, and the width of their middle that counts


class REDCNN2d(nn.Module):
    """float (b, 1, y, x) in, the same out; at least 21 voxels wide. Air is -1, where the last ReLU cuts off."""

    def __init__(self) -> None:
        super().__init__()
        widths = [1, *[_FILTERS] * 5]
        self.down = nn.ModuleList(nn.Conv2d(a, b, 5) for a, b in pairwise(widths))
        back = widths[::-1]
        self.up = nn.ModuleList(nn.ConvTranspose2d(a, b, 5) for a, b in pairwise(back))
        for layer in (*self.down, *self.up):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = []
        for i, layer in enumerate(self.down):
            if i % 2 == 0:
                kept.append(x)
            x = layer(x).relu()
        for i, layer in enumerate(self.up):
            x = layer(x)
            x = x + kept.pop() if i % 2 == 0 else x
            x = x.relu() if kept else x.clamp(min=-1)
        return x


def denoiser(network: nn.Module) -> Callable[[Volume], np.ndarray]:
    """A method as `evaluate.study` takes them: a Volume to HU (z, y, x)."""
    device = next(network.parameters()).device

    @torch.inference_mode()
    def denoise(low: Volume) -> np.ndarray:
        slices = (_enter(torch.from_numpy(hu)[None, None]).to(device) for hu in low.hu)
        return np.stack([_leave(network(one))[0, 0].cpu().numpy() for one in slices])

    return denoise


def load(path: Path) -> Callable[[Volume], np.ndarray]:
    """The method that these weights are, in fp32."""
    network = REDCNN2d()
    network.load_state_dict({name: w.float() for name, w in load_file(path).items()})
    return denoiser(network.eval().to(_device(), memory_format=torch.channels_last))


def halve(weights: Path, out: Path) -> None:
    """A copy in half precision: 3.7 MB."""
    save_file({name: w.half() for name, w in load_file(weights).items()}, out)


def at_plateau(curve: Path) -> bool:
    """Whether the training that left this curve was over."""
    return curve.exists() and _rate([json.loads(line) for line in curve.read_text().splitlines()]) is None


def train(store: Store, dose: float, run: Path, seconds: float) -> None:
    """Go on with the training in `run` for that long, or until validation comes to its plateau.

    run/best.safetensors: the averaged weights of least RMSE over the validation patient; run/curve.jsonl: all
    validations. bf16 where that is the convolutions' fast way, with weights and sums of errors in fp32.
    """
    run.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    training = _Training(run)
    pairs, held_out = _pairs(store, dose, "train"), _middles(_pairs(store, dose, "val"))
    end = time.monotonic() + seconds
    while (rate := _rate(training.curve)) is not None and time.monotonic() < end:
        for _ in range(_EVERY):
            training.learn(*_patches(pairs, training.step), rate)
        training.validate(*held_out)


def _rate(curve: list[dict[str, float]]) -> float | None:
    """The learning rate after these validations; None at the plateau."""
    least, since, fallen = math.inf, 0, 0
    for point in curve:
        since += 1
        if point["rmse_hu"] < _BETTER * least:
            least, since = point["rmse_hu"], 0
        elif since == _PATIENCE:
            fallen, since = fallen + 1, 0
    return _RATES[fallen] if fallen < len(_RATES) else None


class _Training:
    """Network, optimizer, average and curve, kept in `run` at each validation and taken up from there."""

    def __init__(self, run: Path) -> None:
        self.run, self.step, self.curve = run, 0, []
        self.network = REDCNN2d().to(_device(), memory_format=torch.channels_last)
        self.average = AveragedModel(self.network, multi_avg_fn=get_ema_multi_avg_fn(_AVERAGE))
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=_RATES[0])
        if (run / "last.pt").exists():
            state = torch.load(run / "last.pt", weights_only=True)
            self.step, self.curve = state["step"], state["curve"]
            for name, part in self._parts.items():
                part.load_state_dict(state[name])

    @property
    def _parts(self) -> dict[str, Any]:
        return {"network": self.network, "average": self.average, "optimizer": self.optimizer}

    def learn(self, low: torch.Tensor, full: torch.Tensor, rate: float) -> None:
        """One step on patches of HU (b, 1, y, x)."""
        self.optimizer.param_groups[0]["lr"] = rate
        with _autocast():
            denoised = _leave(self.network(_enter(low.to(_device()))))
        # in HU^2: on images between 0 and 1, gradients would come close to Adam's epsilon
        loss = (denoised - full.to(_device())).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.average.update_parameters(self.network)
        self.step += 1

    def validate(self, low: torch.Tensor, full: torch.Tensor, counted: torch.Tensor) -> None:
        """RMSE over what counts of slices of HU (n, 1, y, x); the weights are kept where it is the least so far."""
        with torch.inference_mode(), _autocast():
            denoised = torch.cat(
                [_leave(self.average(_enter(one.to(_device())))).cpu() for one in low.split(1)]
            )
        rmse = (denoised - full)[counted].square().mean().sqrt().item()
        self.curve.append({"step": self.step, "rmse_hu": rmse})
        print(f"{self.run.name}: step {self.step}, validation {rmse:.3f} HU", file=sys.stderr)
        if rmse == min(point["rmse_hu"] for point in self.curve):
            save_file(
                {name: w.contiguous() for name, w in self.average.module.state_dict().items()},
                self.run / "best.safetensors",
            )
        state = {name: part.state_dict() for name, part in self._parts.items()}
        torch.save(state | {"step": self.step, "curve": self.curve}, self.run / "last.tmp")
        (self.run / "last.tmp").replace(self.run / "last.pt")
        (self.run / "curve.jsonl").write_text("".join(json.dumps(point) + "\n" for point in self.curve))


def _enter(hu: torch.Tensor) -> torch.Tensor:
    return hu.float() / _UNIT_HU


def _leave(image: torch.Tensor) -> torch.Tensor:
    return image.float() * _UNIT_HU


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _autocast() -> torch.autocast:
    """bf16 on a GPU, and on a CPU that multiplies in it (every one with AMX does)."""
    device = _device()
    return torch.autocast(
        device, torch.bfloat16, enabled=device == "cuda" or torch.cpu._is_avx512_bf16_supported()
    )


def _pairs(store: Store, dose: float, split: str) -> list[tuple[Volume, Volume]]:
    names = [store.cases[int(i)].name for i in store.split(split)]
    return [(store.volume(name, dose_name(dose)), store.volume(name, FULL_DOSE)) for name in names]


def _patches(pairs: list[tuple[Volume, Volume]], step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches of the step, HU (b, 1, 55, 55); slices drawn alike from all patients, some turned over."""
    random, cut = np.random.default_rng((0, step)), []
    for _ in range(_BATCH):
        pair = pairs[random.integers(len(pairs))]
        z, y, x = (
            int(random.integers(n - size + 1))
            for n, size in zip(pair[0].shape, (1, _PATCH, _PATCH), strict=True)
        )
        turn = random.choice([-1, 1], 2)
        cut.append([v.hu[z, y : y + _PATCH, x : x + _PATCH][:: turn[0], :: turn[1]] for v in pair])
    both = torch.from_numpy(np.array(cut)).float()
    return both[:, :1], both[:, 1:]


def _middles(pairs: list[tuple[Volume, Volume]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Some slices' middle fields, spread over the first of `pairs`: HU (n, 1, y, x), low dose and full; and, as bool,
    which voxels are not padding."""
    shape = pairs[0][0].shape
    z = np.linspace(0, shape[0] - 1, _VALIDATED).round().astype(int)
    y, x = (slice((n - _FIELD) // 2, (n + _FIELD) // 2) for n in shape[1:])
    low, full = (v.hu[z] for v in pairs[0])
    counted = ~padding_of(full)  # told of whole slices alone
    low, full, counted = (torch.from_numpy(whole[:, y, x])[:, None] for whole in (low, full, counted))
    return low.float(), full.float(), counted
