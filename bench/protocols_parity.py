"""Do our ldctbench protocols give ldct-benchmark's own numbers, and redcnn-l506 those of its formulas?

ldct-benchmark's compute_metric, from PyPI, installed apart in a venv of its own under bench/.cache, scores the same
slices: a generated abdomen and, of the package's own data, a real one, with noise put in where they were scanned and
none in their padding. RED-CNN's measures are written out below, in torch. The last line printed is JSON:

worst_difference   the largest |ours - theirs| over all slices and measures; must be below 1e-4
float32            the same against ldct-benchmark's answers to float32 images, which is how its own script asks
redcnn             the largest |ours - the formulas'|; must be below 1e-4
padding            the share of padding by target
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import torch

from ldct_dist.ct.dicom import one_series, read_series
from ldct_dist.ct.phantom import body
from ldct_dist.ct.volume import AIR_HU, padding_of
from ldct_dist.evaluate.metrics import evaluate_volume

CACHE = Path(__file__).parent / ".cache"
PEER = CACHE / "ldct-benchmark"
PACKAGES = [
    "ldct-benchmark==0.0.15",
    "tqdm",
    "platformdirs",
    "pandas",
    "tabulate",
    "torchmetrics",
    "requests",
    "urllib3",
]
PACKAGES += ["charset-normalizer", "idna", "certifi", "pyyaml"]
# wanted at import, not by compute_metric
UNUSED = ("wandb", "torchvision", "torchvision.models", "ldctbench.evaluate.ldct_iqa")
EXAMS = {"C": "ldctbench-chest", "L": "ldctbench-abdomen", "N": "ldctbench-neuro"}
MEASURES = {"RMSE": "rmse_hu", "PSNR": "psnr_db", "SSIM": "ssim", "VIF": "vif"}
ROOT = Path(__file__).parents[1]
DEMO_DATA = ROOT / "ldct_dist" / "demo_data"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        _score(*arguments.peer)
        return
    _install()
    worst = {"float64": 0.0, "float32": 0.0, "redcnn": 0.0}
    padding = {}
    for name, full in _targets().items():
        outside = padding_of(full)
        padding[name] = round(float(outside.mean()), 3)
        image = np.rint(full + np.random.default_rng(0).normal(0, 30, full.shape)).clip(-1024, 3071)
        image[outside] = AIR_HU
        theirs = _peer_scores(image, full)
        asked = [
            (protocol, ours, digits, theirs[digits][exam][measure])
            for exam, protocol in EXAMS.items()
            for measure, ours in MEASURES.items()
            for digits in ("float64", "float32")
        ]
        asked += [("redcnn-l506", ours, "redcnn", values) for ours, values in _red_cnn(image, full).items()]
        for protocol, measure, kind, expected in asked:
            values = [_ours(image[i : i + 1], full[i : i + 1], protocol, measure) for i in range(len(full))]
            apart = float(np.abs(np.subtract(values, expected)).max())
            worst[kind] = max(worst[kind], apart)
            print(f"{name} {protocol} {measure} {kind}: {values[0]:.5f}, apart by {apart:.2e}")
    print(json.dumps({"worst_difference": worst.pop("float64"), **worst, "padding": padding}))


def _targets() -> dict[str, np.ndarray]:
    """Full doses, (z, y, x) HU: a phantom whose air holds a little noise, and a patient."""
    phantom = body((3, 256, 256), (5.0, 1.5, 1.5), seed=0).hu
    grain = np.random.default_rng(1).normal(0, 6, phantom.shape)
    noisy = np.where(padding_of(phantom), AIR_HU, np.rint(phantom + grain).clip(AIR_HU))
    patient = read_series(one_series(next(p for p in sorted(DEMO_DATA.iterdir()) if p.is_dir()))).hu
    return {"phantom": noisy, "patient": patient[::8].astype(np.float64)}


def _ours(image: np.ndarray, full: np.ndarray, protocol: str, measure: str) -> float:
    return evaluate_volume(image, full, protocol, measures=(measure,))[measure]


def _red_cnn(image: np.ndarray, full: np.ndarray) -> dict[str, list[float]]:
    """RMSE, PSNR and SSIM of every slice in [-160, 240] HU: means by an 11 x 11 Gaussian of sigma 1.5, zeros around."""
    x, y = (torch.from_numpy(hu).double().clip(-160, 240)[:, None] for hu in (image, full))
    line = torch.exp(-((torch.arange(11).double() - 5) ** 2) / (2 * 1.5**2))
    window = (line[:, None] * line / line.sum() ** 2)[None, None]
    mean_x, mean_y, xx, yy, xy = (
        torch.nn.functional.conv2d(each, window, padding=5) for each in (x, y, x * x, y * y, x * y)
    )
    c1, c2 = (0.01 * 400) ** 2, (0.03 * 400) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * (xy - mean_x * mean_y) + c2) / (xx - mean_x**2 + yy - mean_y**2 + c2)
    rmse = (x - y).square().mean(dim=(1, 2, 3)).sqrt()
    found = {
        "rmse_hu": rmse,
        "psnr_db": 20 * torch.log10(400 / rmse),
        "ssim": (luminance * structure).mean(dim=(1, 2, 3)),
    }
    return {measure: values.tolist() for measure, values in found.items()}


def _install() -> None:
    """The peer's venv, which finds torch and scikit-image where this interpreter does."""
    if PEER.exists():
        return
    venv.create(PEER, with_pip=True)
    site = next((PEER / "lib").glob("python*")) / "site-packages"
    (site / "host.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [PEER / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps", *PACKAGES]
    subprocess.run(pip, check=True, stdout=sys.stderr)


def _peer_scores(image: np.ndarray, full: np.ndarray) -> dict[str, dict[str, dict[str, list[float]]]]:
    """digits -> exam -> measure -> the peer's answer to every slice."""
    images, scores = CACHE / "parity.npz", CACHE / "parity.json"
    np.savez(images, image=image, full=full)
    command = [PEER / "bin" / "python", __file__, "--peer", images, scores]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    return json.loads(scores.read_text())


def _score(images: Path, scores: Path) -> None:
    """In the peer's own interpreter."""
    import torchmetrics  # noqa: F401  first, because it asks after torchvision

    sys.modules |= {name: MagicMock() for name in UNUSED}
    from ldctbench.evaluate.utils import compute_metric

    pair = np.load(images)
    answers = {}
    for digits in ("float64", "float32"):
        full, image = ((pair[name] + 1024)[:, None].astype(digits) for name in ("full", "image"))
        answers[digits] = {
            exam: compute_metric(full, image, list(MEASURES), exam_type=exam) for exam in EXAMS
        }
    scores.write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
