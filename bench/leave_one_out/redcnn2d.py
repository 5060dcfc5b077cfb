"""RED-CNN as published, slice by slice, and a plain loop that trains it.

Chen et al., IEEE Trans Med Imaging 36 (2017): five 5 x 5 convolutions of 96 filters without padding, five
deconvolutions, three shortcuts, ReLU; mean square error, Adam at 1e-4, patches of 55 x 55, weights drawn with 0.01.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ldct_dist.ct.volume import AIR_HU, Volume
from ldct_dist.store.layout import FULL_DOSE, dose_name
from ldct_dist.store.reader import Store

_FILTERS, _PATCH, _BATCH, _RATE = 96, 55, 16, 1e-4
_RANGE_HU = 4096.0  # images enter as (HU - air) / range, between 0 and 1
_EVERY, _PATIENCE = 500, 10  # steps between validations; so many without a better one are the plateau


class REDCNN2d(nn.Module):
    """float (b, 1, y, x) in, the same out; at least 21 voxels wide."""

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
            x = (x + kept.pop() if i % 2 == 0 else x).relu()
        return x


def denoiser(network: REDCNN2d) -> Callable[[Volume], np.ndarray]:
    """A method as `evaluate.study` takes them: a Volume to HU (z, y, x)."""

    @torch.inference_mode()
    def denoise(low: Volume) -> np.ndarray:
        device = next(network.parameters()).device
        slices = ((torch.from_numpy(hu).to(device).float() - AIR_HU) / _RANGE_HU for hu in low.hu)
        return np.stack([(network(s[None, None])[0, 0] * _RANGE_HU + AIR_HU).cpu().numpy() for s in slices])

    return denoise


def load(path: Path) -> Callable[[Volume], np.ndarray]:
    network = REDCNN2d()
    network.load_state_dict({name: w.float() for name, w in load_file(path).items()})
    return denoiser(network.eval().to("cuda" if torch.cuda.is_available() else "cpu"))


def halve(weights: Path, out: Path) -> None:
    """A copy in half precision: 3.7 MB."""
    save_file({name: w.half() for name, w in load_file(weights).items()}, out)


def at_plateau(curve: Path) -> bool:
    """Whether the training that left this curve was over."""
    return curve.exists() and _plateau([json.loads(line) for line in curve.read_text().splitlines()])


def train(store: Store, dose: float, run: Path, seconds: float) -> bool:
    """Go on with the training in `run` for that long; whether the plateau of validation is reached.

    run/best.safetensors: the weights of least RMSE over the validation patient; run/curve.jsonl: all validations.
    """
    run.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    network = REDCNN2d().to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=_RATE)
    step, curve = _resume(run, network, optimizer)
    pairs = _pairs(store, dose, "train")
    end = time.monotonic() + seconds
    while not _plateau(curve) and time.monotonic() < end:
        low, full = _patches(pairs, step)
        loss = (network(low.to(device)) - full.to(device)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        if step % _EVERY == 0:
            curve.append({"step": step, "rmse_hu": _rmse(network, _pairs(store, dose, "val"))})
            if curve[-1] == min(curve, key=lambda point: point["rmse_hu"]):
                save_file(network.state_dict(), run / "best.safetensors")
            _keep(run, network, optimizer, step, curve)
    _keep(run, network, optimizer, step, curve)
    return _plateau(curve)


def _plateau(curve: list[dict[str, float]]) -> bool:
    best = min(range(len(curve)), key=lambda i: curve[i]["rmse_hu"], default=0)
    return len(curve) > best + _PATIENCE


def _pairs(store: Store, dose: float, split: str) -> list[tuple[Volume, Volume]]:
    names = [store.cases[int(i)].name for i in store.split(split)]
    return [(store.volume(name, dose_name(dose)), store.volume(name, FULL_DOSE)) for name in names]


def _patches(pairs: list[tuple[Volume, Volume]], step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches of the step, (b, 1, 55, 55) between 0 and 1; slices drawn alike from all patients, some turned over."""
    random, cut = np.random.default_rng((0, step)), []
    for _ in range(_BATCH):
        pair = pairs[random.integers(len(pairs))]
        z, y, x = (
            int(random.integers(n - size + 1))
            for n, size in zip(pair[0].shape, (1, _PATCH, _PATCH), strict=True)
        )
        turn = random.choice([-1, 1], 2)
        cut.append([v.hu[z, y : y + _PATCH, x : x + _PATCH][:: turn[0], :: turn[1]] for v in pair])
    both = (torch.from_numpy(np.array(cut)).float() - AIR_HU) / _RANGE_HU
    return both[:, :1], both[:, 1:]


def _rmse(network: REDCNN2d, pairs: list[tuple[Volume, Volume]]) -> float:
    denoise = denoiser(network)
    errors = [np.square(denoise(low) - full.hu)[full.hu > AIR_HU].mean() for low, full in pairs]
    return float(np.sqrt(np.mean(errors)))


def _resume(run: Path, network: REDCNN2d, optimizer: torch.optim.Adam) -> tuple[int, list[dict[str, float]]]:
    path = run / "last.pt"
    if not path.exists():
        return 0, []
    state = torch.load(path, weights_only=True)
    network.load_state_dict(state["network"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["curve"]


def _keep(
    run: Path, network: REDCNN2d, optimizer: torch.optim.Adam, step: int, curve: list[dict[str, float]]
) -> None:
    state = {
        "network": network.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "curve": curve,
    }
    torch.save(state, run / "last.tmp")
    (run / "last.tmp").replace(run / "last.pt")
    (run / "curve.jsonl").write_text("".join(json.dumps(point) + "\n" for point in curve))
