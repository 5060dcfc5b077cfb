"""Do our ldctbench protocols give ldct-benchmark's own numbers?

Its compute_metric, from PyPI, installed apart in a venv of its own under bench/.cache, scores the same slices: a
generated abdomen and, of the package's own data, a real one, with noise put in. The last line printed is JSON:

worst_difference   the largest |ours - theirs| over all slices and measures; must be below 1e-4
float32            the same against its answers to float32 images, which is how its own script asks
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

from ldct_dist.ct.dicom import one_series, read_series
from ldct_dist.ct.phantom import body
from ldct_dist.evaluate.metrics import evaluate_volume
from ldct_dist.evaluate.protocols import protocol_named

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
UNUSED = (
    "wandb",
    "torchvision",
    "torchvision.models",
    "ldctbench.evaluate.ldct_iqa",
)  # wanted at import, not by compute_metric
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
    worst = {"float64": 0.0, "float32": 0.0}
    for name, full in _targets().items():
        image = np.rint(full + np.random.default_rng(0).normal(0, 30, full.shape)).clip(-1024, 3071)
        theirs = _peer_scores(image, full)
        for exam, protocol in EXAMS.items():
            for measure, ours in MEASURES.items():
                values = [_ours(image[i : i + 1], full[i : i + 1], protocol, ours) for i in range(len(full))]
                for digits in worst:
                    apart = float(np.abs(np.subtract(values, theirs[digits][exam][measure])).max())
                    worst[digits] = max(worst[digits], apart)
                    print(f"{name} {protocol} {measure} {digits}: {values[0]:.5f}, apart by {apart:.2e}")
    print(json.dumps({"worst_difference": worst["float64"], "float32": worst["float32"]}))


def _targets() -> dict[str, np.ndarray]:
    """Full doses, (z, y, x) HU: a phantom whose air holds a little noise, and a patient."""
    phantom = body((3, 256, 256), (5.0, 1.5, 1.5), seed=0).hu
    grain = np.random.default_rng(1).normal(0, 6, phantom.shape)
    patient = read_series(one_series(next(p for p in sorted(DEMO_DATA.iterdir()) if p.is_dir()))).hu
    return {"phantom": np.rint(phantom + grain).clip(-1024), "patient": patient[::8].astype(np.float64)}


def _ours(image: np.ndarray, full: np.ndarray, protocol: str, measure: str) -> float:
    everything = np.ones(full.shape, bool)
    return evaluate_volume(image, full, protocol_named(protocol), everything, (measure,))[measure]


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
