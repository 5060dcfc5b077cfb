"""(d) Whether the loader keeps a training step fed, and (e) whole volumes denoised, against MONAI's sliding window."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from gpus.steps import config_of
from gpus.timing import forget_peak, once, peak
from ldct_dist.ct.volume import Volume
from ldct_dist.data.loader import Loader
from ldct_dist.data.plan import Plan
from ldct_dist.denoise.tiles import denoise_volume
from ldct_dist.models.losses import build_loss, mask_from_box
from ldct_dist.models.registry import Denoiser, build
from ldct_dist.store import layout
from ldct_dist.store.reader import Store
from ldct_dist.train.strategy.ddp import DDPStrategy
from ldct_dist.world import World


def data_wait(size: str, crop: tuple[int, int, int], crops: int, device: torch.device, steps: int) -> float:
    """Share of the time of `steps` steps that is spent waiting for data, after a few that warm up."""
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(size, crop, crops, data={"threads": 4, "memory_mib": 4096})
        plan = Plan(_store(Path(folder) / "ct.zarr", crop), config.data, seed=0)
        strategy = DDPStrategy(build(config.model), config, World(device=device))
        loss = build_loss(config.loss)
        waited: list[float] = []
        spent: list[float] = []
        with Loader(plan, device=device) as loader:
            for i in range(steps + 5):

                def step(i: int = i) -> None:
                    batch = loader.batch(i)
                    handed = time.perf_counter()
                    if device.type == "cuda":
                        # The stream has nothing else to do: it waits for the copy of the batch, if that is still on.
                        torch.cuda.current_stream(device).synchronize()
                    waited.append(loader.waited_s + time.perf_counter() - handed)
                    mask = mask_from_box(batch.box, batch.low.shape[2:], (0, 0, 0))
                    strategy.backward(loss(strategy(batch.low), batch.full, mask).mean())
                    strategy.clip()
                    strategy.step(1e-4)
                    strategy.forget_gradients()

                spent.append(once(step, device))
    return sum(waited[5:]) / sum(spent[5:])


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

    defaults: our bf16 against MONAI in fp32; same: bf16 on both sides, and windows as large as what our network is given
    at once, which take the same memory. Each is timed on its second volume: on the first, cuDNN chooses kernels.
    bf16_from_fp32: root mean square of the difference of our two answers, over that of the network's change; faulty
    kernels would make it large.
    """
    hu = np.random.default_rng(0).normal(0, 200, shape).astype(np.int16)
    model = build(config_of(size, (8, 32, 32), 1).model).to(device).eval()
    torch.nn.init.normal_(model.network.last.weight, std=0.1)
    told: dict[str, float] = {}

    def measure(name: str, act: Callable[[], np.ndarray]) -> np.ndarray:
        answer = act()
        before = forget_peak(device)
        told[f"{name}_voxels_per_s"] = hu.size / once(act, device)
        told[f"{name}_peak_bytes"] = (peak(device) or 0) - before
        return answer

    tile, given = (4, 16, 16) if tiny else None, []
    hook = model.register_forward_pre_hook(lambda _, inputs: given.append(tuple(inputs[0].shape[2:])))
    answers = []
    for name, bf16 in (("fp32", False), ("bf16", True)):
        given.clear()
        answers.append(
            measure(name, lambda bf16=bf16: denoise_volume(model, hu, tile=tile, bf16=bf16)).astype(float)
        )
    hook.remove()
    told["bf16_from_fp32"] = float(np.std(answers[1] - answers[0]) / np.std(answers[0] - hu))
    try:
        import monai  # noqa: F401
    except ModuleNotFoundError:
        return told | {"skipped": "monai"}
    window, largest = (4, 16, 16) if tiny else (32, 96, 96), max(given, key=math.prod)
    measure("monai_defaults", lambda: _monai(model, hu, window, 4, None, device))
    measure("monai_same", lambda: _monai(model, hu, largest, 1, torch.bfloat16, device))
    ratios = {
        name: told["bf16_voxels_per_s"] / told[f"monai_{name}_voxels_per_s"] for name in ("defaults", "same")
    }
    return told | ratios


def _monai(
    model: Denoiser,
    hu: np.ndarray,
    window: tuple[int, int, int],
    batch: int,
    dtype: torch.dtype | None,
    device: torch.device,
) -> np.ndarray:
    """From the volume in memory to the answer in memory."""
    from monai.inferers import sliding_window_inference

    x = torch.from_numpy(hu).to(device).float()[None, None]
    with (
        torch.inference_mode(),
        torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None),
    ):
        answer = sliding_window_inference(x, window, batch, model, overlap=0.25, mode="gaussian")
    return answer[0, 0].round().to(torch.int16).cpu().numpy()
