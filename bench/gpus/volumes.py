"""(d) Whether the loader keeps a training step fed, and (e) whole volumes denoised, against MONAI's sliding window."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch

from gpus.steps import config_of
from gpus.timing import once, wait
from ldct_dist.ct.volume import Volume
from ldct_dist.data.loader import Loader
from ldct_dist.data.plan import Plan
from ldct_dist.denoise.tiles import TILES, denoise_volume
from ldct_dist.models.losses import build_loss, mask_from_box
from ldct_dist.models.registry import Denoiser, build
from ldct_dist.store import layout
from ldct_dist.store.reader import Store
from ldct_dist.train.strategy.ddp import DDPStrategy
from ldct_dist.world import World


def data_wait(size: str, crop: tuple[int, int, int], crops: int, device: torch.device, steps: int) -> float:
    """Share of the time of so many steps that they wait for data, after a few that warm up."""
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(size, crop, crops, data={"threads": 4, "memory_mib": 4096})
        plan = Plan(_store(Path(folder) / "ct.zarr", crop), config.data, seed=0)
        strategy = DDPStrategy(build(config.model), config, World(device=device))
        loss = build_loss(config.loss)
        waited = spent = 0.0
        with Loader(plan, device=device) as loader:
            for i in range(steps + 5):

                def step(i: int = i) -> None:
                    batch = loader.batch(i)
                    mask = mask_from_box(batch.box, batch.low.shape[2:], (0, 0, 0))
                    strategy.backward(loss(strategy(batch.low), batch.full, mask).mean())
                    strategy.clip()
                    strategy.step(1e-4)
                    strategy.forget_gradients()

                took = once(step, device)
                if i >= 5:
                    waited, spent = waited + loader.waited_s, spent + took
    return waited / spent


def _store(path: Path, crop: tuple[int, int, int]) -> Store:
    layout.create(path)
    random = np.random.default_rng(0)
    shape = [2 * n for n in crop]
    for i in range(8):
        full, low = (Volume(random.normal(40, s, shape).astype(np.int16), (1.0, 0.7, 0.7)) for s in (10, 20))
        layout.write_case(path, f"case-{i}", {1.0: full, 0.25: low}, patient=f"{i}", split="train")
    layout.finalise(path)
    return Store(path)


def denoising(size: str, shape: tuple[int, int, int], device: torch.device, tiny: bool) -> dict[str, float]:
    """Voxels a second of ours and of MONAI's (overlap 0.25, gaussian), and their ratios; ours alone without MONAI.

    defaults: our bf16 against MONAI in fp32; same: bf16 on both sides, and windows as large as our tiles.
    """
    hu = np.random.default_rng(0).normal(0, 200, shape).astype(np.int16)
    model = build(config_of(size, (8, 32, 32), 1).model).to(device).eval()
    torch.nn.init.normal_(model.network.last.weight, std=0.01)
    tile = (4, 16, 16) if tiny else TILES[device.type][0]
    ours = {}
    for name, bf16 in (("fp32", False), ("bf16", True)):
        denoise_volume(model, hu[: tile[0]], tile=tile, bf16=bf16)
        took = once(lambda bf16=bf16: denoise_volume(model, hu, tile=tile, bf16=bf16), device)
        ours[f"{name}_voxels_per_s"] = hu.size / took
    try:
        import monai  # noqa: F401
    except ModuleNotFoundError:
        return ours | {"skipped": "monai"}
    window = (4, 16, 16) if tiny else (32, 96, 96)
    theirs = {
        "monai_defaults_voxels_per_s": hu.size / _monai(model, hu, window, 4, None, device),
        "monai_same_voxels_per_s": hu.size / _monai(model, hu, tile, 1, torch.bfloat16, device),
    }
    ratios = {
        "defaults": ours["bf16_voxels_per_s"] / theirs["monai_defaults_voxels_per_s"],
        "same": ours["bf16_voxels_per_s"] / theirs["monai_same_voxels_per_s"],
    }
    return ours | theirs | ratios


def _monai(
    model: Denoiser,
    hu: np.ndarray,
    window: tuple[int, int, int],
    batch: int,
    dtype: torch.dtype | None,
    device: torch.device,
) -> float:
    """Seconds from the volume in memory to the answer in memory."""
    from monai.inferers import sliding_window_inference

    def run(given: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(given).to(device, torch.float32)[None, None]
        with (
            torch.inference_mode(),
            torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None),
        ):
            answer = sliding_window_inference(x, window, batch, model, overlap=0.25, mode="gaussian")
        return answer[0, 0].round().to(torch.int16).cpu().numpy()

    run(hu[: window[0]])
    wait(device)
    return once(lambda: run(hu), device)
