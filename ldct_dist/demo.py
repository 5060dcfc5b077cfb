"""The main job end to end, on two real patients that come with the package: see `ldct-dist demo`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ldct_dist import config as configs
from ldct_dist.checkpoint.load import weights_of
from ldct_dist.cluster.local import LocalRanks, ranks_here
from ldct_dist.ct.derived import write_simulated
from ldct_dist.ct.dicom import one_series, read_series
from ldct_dist.ct.volume import Volume
from ldct_dist.denoise.volumes import denoise_series
from ldct_dist.errors import UserError
from ldct_dist.evaluate.baselines import gaussian, tune
from ldct_dist.evaluate.classify import classify
from ldct_dist.evaluate.compare import COLUMNS, Comparison, print_classification, print_comparison
from ldct_dist.evaluate.figures import three_planes
from ldct_dist.evaluate.methods import network
from ldct_dist.evaluate.metrics import evaluate_volume
from ldct_dist.evaluate.protocols import protocol_named
from ldct_dist.evaluate.tasks import LESION_TRAINING, lesion_samples
from ldct_dist.files import real
from ldct_dist.store.ingest import IngestConfig, ingest
from ldct_dist.store.layout import dose_name
from ldct_dist.store.reader import Store
from ldct_dist.train.config import RunConfig

DATA = Path(__file__).parent / "demo_data"
TRAIN_PATIENT, TEST_PATIENT = "CRLM-CT-1006", "CRLM-CT-1004"
RANKS = min(2, ranks_here())
KEY = "demo.key"


def run(config_path: Path, overrides: Sequence[str], console: Console) -> None:
    """Ingest, train with a kill in the middle, denoise, compare; everything stays in the run's folder, made anew.

    Raises UserError for a folder or a store that is not the demo's, and if a step of it fails.
    """
    start = time.monotonic()
    config = configs.read(RunConfig, config_path, overrides)
    folder = _folder_made_anew(config)

    console.rule("1/4  DICOM to Zarr, quarter dose simulated")
    _ingest(config, folder / KEY, console)
    console.rule(f"2/4  training on {TRAIN_PATIENT}, processes: {RANKS}, killed once and resumed")
    resumed_at = _train_with_a_kill(config, [str(config_path), *overrides], folder, console)
    console.rule(f"3/4  denoising {TEST_PATIENT}, which training has not seen")
    low, denoised, full = _denoise(config, folder, console)
    console.rule("4/4  what came out")
    comparison = _compare(config, low, denoised, full)
    print_comparison(comparison, console)
    picture = folder / "comparison.png"
    window = protocol_named(comparison.protocol).window
    three_planes(picture, {"low dose": low, "denoised": denoised, "full dose": full}, window, TEST_PATIENT)
    console.print(
        "\nIs there a lesion? A generated task, at 4 % of the dose, for a CNN trained on each kind of image:"
    )
    classified = classify(lesion_samples({"denoised": network(weights_of(folder))}), LESION_TRAINING)
    print_classification(classified, console)
    _write_result(folder, comparison, classified, resumed_at, time.monotonic() - start)
    console.print(f"\nTensorBoard      {_beside_python('tensorboard')} --logdir {folder / 'tensorboard'}")
    console.print(f"denoised series  {folder / 'denoised'}")
    console.print(f"picture          {picture}")
    console.print(f"figures          {folder / 'result.json'}")


def _folder_made_anew(config: RunConfig) -> Path:
    """The run's folder, empty but for the key that marks it as the demo's. Only what bears that mark is deleted."""
    folder = config.runs / config.name
    if not real(config.store).is_relative_to(real(folder)):
        raise UserError(
            f"store={config.store}: the demo ingests its own two patients, into the folder of its run alone; give "
            f"store={folder / 'ct.zarr'}"
        )
    if folder.exists() and not (folder / KEY).exists() and any(folder.iterdir()):
        raise UserError(
            f"{folder}: not made by the demo, which would delete it; choose another run with name=NAME"
        )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    # Public data, so no secret: a fixed key makes the store, and with it the sample order, the same everywhere.
    (folder / KEY).write_text("00" * 32)
    return folder


def _beside_python(command: str) -> str:
    """How to call a command of this environment from here, whether or not it is activated."""
    return os.path.relpath(Path(sys.executable).with_name(command))


def _ingest(config: RunConfig, key: Path, console: Console) -> None:
    splits = {TRAIN_PATIENT: "train", TEST_PATIENT: "test"}
    settings = IngestConfig(dose=config.data.dose, split_of=splits, seed=config.seed, key=key)
    report = ingest(DATA, config.store, settings)
    if report.rejected:
        raise UserError(f"{report.rejected[0].where}: {report.rejected[0].reason}")
    console.print(f"{len(report.written)} patients -> {config.store}")


def _train_with_a_kill(config: RunConfig, arguments: list[str], folder: Path, console: Console) -> int:
    """Train, SIGKILL all processes once half the steps are done, train on; the step it went on from."""
    kill_at = config.steps // 2
    with LocalRanks(["train", *arguments], RANKS) as ranks:
        while _steps_done(folder) < kill_at:
            if (code := ranks.poll()) is not None:
                raise UserError(f"training ended by itself with exit code {code}; its lines above say why")
            time.sleep(0.05)
        ranks.signal(signal.SIGKILL)
        ranks.wait()
    console.print(
        f"[bold red]SIGKILL[/] to all processes at step {_steps_done(folder)}; the same command again:",
        markup=True,
    )
    with LocalRanks(["train", *arguments], RANKS) as ranks:
        if (code := ranks.wait()) != 0:
            raise UserError(f"the resumed training ended with exit code {code}; its lines above say why")
    starts = json.loads((folder / "environment.json").read_text())
    return int(starts[-1]["from_step"])


def _steps_done(folder: Path) -> int:
    losses = folder / "losses.jsonl"
    return losses.read_bytes().count(b"\n") if losses.exists() else 0


def _denoise(config: RunConfig, folder: Path, console: Console) -> tuple[Volume, Volume, Volume]:
    """The held-out patient from low-dose DICOM to denoised DICOM; low, denoised and full as they lie on disk."""
    store = Store(config.store)
    case = store.cases[int(store.split("test")[0])].name
    source = one_series(DATA / TEST_PATIENT)
    low = store.volume(case, dose_name(config.data.dose))
    write_simulated(source, low.hu, folder / "low-dose", config.data.dose)
    denoise_series(folder, folder / "low-dose", folder / "denoised")
    console.print(f"{len(low.hu)} slices -> {folder / 'denoised'}")
    low, denoised = (read_series(one_series(folder / name)) for name in ("low-dose", "denoised"))
    return low, denoised, read_series(source)


def _compare(config: RunConfig, low: Volume, denoised: Volume, full: Volume) -> Comparison:
    """Low dose, denoised, and a Gaussian filter at its best: of the width that suits this very patient."""
    measure = protocol_named(config.validation.protocol)
    filtered = gaussian(low, tune("gaussian", [(low, full)]))
    images = {"low dose": low, "gaussian": filtered, "denoised": denoised}
    figures = {name: evaluate_volume(volume.hu, full.hu, measure) for name, volume in images.items()}
    return Comparison(TEST_PATIENT, measure.name, figures)


def _write_result(
    folder: Path, comparison: Comparison, classified: dict[str, Any], resumed_at: int, seconds: float
) -> None:
    names = {"low": "low dose", "denoised": "denoised", "gaussian": "gaussian"}
    result: dict[str, Any] = {
        **{
            f"{key.partition('_')[0]}_{name}": comparison.figures[image][key]
            for key in COLUMNS
            for name, image in names.items()
        },
        "protocol": comparison.protocol,
        "classification_auc": {image: row["auc"] for image, row in classified["images"].items()},
        "resumed_at_step": resumed_at,
        "seconds": round(seconds, 1),
    }
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
