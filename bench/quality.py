"""Is a network of this package the best denoiser of these patients, and does it keep what matters?

    python bench/quality.py                          # measures the weights in the repository: 16 to 30 minutes on 2 cores
    python bench/quality.py --train --budget 28800   # first trains what is missing, for so many seconds in all; resumable

Four quiet series of four patients (--data, see bench/leave_one_out/patients.py), a quarter of the dose simulated.
Each patient is left out once: a network learns from two of the others and is chosen by the third; the filters are tuned
on all three. Training is in bf16, ours at the end with faint lesions and noise of many strengths; measuring is in fp32.
The last line printed is JSON:

rmse, ssim         by method: mean over patients, with the 95 % interval over patients; under `protocol`
d_prime            the channelised Hotelling observer's, on a phantom with each patient's kernel and noise: of balls, and
                   of rods across all slices
ours_minus         each of these figures less that of low dose, and of RED-CNN, paired by patient, with intervals
worst_bias_hu      mean bias in the tissue class where it is furthest from 0, and its name
goals              ours: first in RMSE, in SSIM; d' not below low dose's, RED-CNN's, by shape; every bias below 2 HU
not_measured       methods without weights for every patient
at_plateau         by patient: whether RED-CNN's validation reached its plateau; its curves lie beside the weights
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from leave_one_out import redcnn2d
from leave_one_out.patients import DOSE, folds

from ldct_dist.checkpoint.load import weights_of
from ldct_dist.data.augment import AugmentConfig
from ldct_dist.data.lesions import LesionConfig
from ldct_dist.errors import UserError
from ldct_dist.evaluate import results
from ldct_dist.evaluate.baselines import BASELINES, tune
from ldct_dist.evaluate.examination import measure
from ldct_dist.evaluate.methods import LOW, Method, network
from ldct_dist.evaluate.physics.lesions import BALL, ROD
from ldct_dist.evaluate.statistics import estimate, paired_tests
from ldct_dist.evaluate.study import Study, StudyConfig
from ldct_dist.store.layout import FULL_DOSE, dose_name
from ldct_dist.store.reader import Store
from ldct_dist.train.config import RunConfig
from ldct_dist.train.ending import Ending
from ldct_dist.train.trainer import train

HERE = Path(__file__).resolve().parent
OURS, PEER = "ours", "redcnn2d"
FILTERS = ("gaussian", "tv", "nlm")
PROTOCOL = "abdomen"
LESIONS_SHARE = 0.15  # of the steps, once more, with lesions
STRENGTH = 0.85
SOFTER = f"{OURS} at {STRENGTH}"  # between it and the low dose: what that costs, and what it keeps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=HERE.parent.parent / "shared" / "data")
    parser.add_argument("--work", type=Path, default=HERE / ".cache" / "quality", help="stores and runs")
    parser.add_argument("--weights", type=Path, default=HERE / "leave_one_out" / "weights")
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--only", choices=(OURS, PEER), help="train one of the two")
    parser.add_argument("--budget", type=float, default=28800, help="seconds of training in all")
    parser.add_argument("--steps", type=int, default=20000, help="of ours: 45 minutes a fold on one core")
    options = parser.parse_args()
    work, weights = options.work, options.weights
    work.mkdir(parents=True, exist_ok=True)
    stores = folds(options.data, work)
    if options.train:
        weights.mkdir(parents=True, exist_ok=True)
        kinds = (options.only,) if options.only else (OURS, PEER)
        share = options.budget / len(kinds) / len(stores)  # what a fold leaves over is not passed on
        for patient, path in stores.items():
            if OURS in kinds and not is_trained(weights / f"{OURS}-{patient}.jsonl", options.steps):
                train_ours(path, work, weights, patient, options.steps, share)
            if PEER in kinds and not redcnn2d.at_plateau(weights / f"{PEER}-{patient}.jsonl"):
                train_peer(path, work, weights, patient, share)
    studies = {patient: study_of(Store(path), weights, patient) for patient, path in stores.items()}
    print(json.dumps(figures(studies, weights)))


def is_trained(losses: Path, steps: int) -> bool:
    """Whether the training that left these losses of ours came to its end."""
    return losses.exists() and json.loads(losses.read_text().splitlines()[-1])["step"] == steps


def train_ours(store: Path, work: Path, weights: Path, patient: str, steps: int, seconds: float) -> None:
    """The package's own trainer: on scans as they are, then on scans with lesions. The second run's best weights by the
    validation patient, and every 50th loss of either, go to `weights`."""
    plain = as_they_are(store, work, patient, steps, seconds / (1 + LESIONS_SHARE))
    if train(plain) is not Ending.DONE:
        return  # out of time: goes on at the next call
    kept = with_lesions(plain)
    if train(kept) is not Ending.DONE:
        return
    shutil.copy(weights_of(kept.runs / kept.name), weights / f"{plain.name}.safetensors")
    for config in (plain, kept):
        losses = (config.runs / config.name / "losses.jsonl").read_text().splitlines(keepends=True)
        (weights / f"{config.name}.jsonl").write_text("".join(losses[49::50]))


def as_they_are(store: Path, work: Path, patient: str, steps: int, seconds: float) -> RunConfig:
    """Training on scans as they are."""
    return RunConfig(
        name=f"{OURS}-{patient}",
        runs=work / "runs",
        store=store,
        steps=steps,
        data={"dose": DOSE, "crop": (8, 64, 64), "batch": 4, "memory_mib": 512},
        model={"name": "unet3d", "size": "s", "thick_slices": True},
        precision="bf16",
        loss={"eps_hu": 10, "margin": (0, 0, 0)},
        optim={"lr": 2e-3, "warmup": 100, "ema": 0.995},
        validation={"every": max(1, steps // 10), "protocol": PROTOCOL},
        checkpoint={"every": max(1, steps // 10)},
        log={"every": 100, "images": False},
        time_limit_s=seconds,
    )


def with_lesions(plain: RunConfig) -> RunConfig:
    """Fine-tuning of that run's best weights: one tissue voxel in twelve is part of a lesion, and the noise is that of
    several doses, or the network would suit the training patients' noise alone."""
    assert plain.time_limit_s is not None
    steps = max(4, int(LESIONS_SHARE * plain.steps))
    every = {"every": steps // 4}
    augment = AugmentConfig(dose_mix=(0.6, 1.5), lesions=LesionConfig(count=24))
    return plain.model_copy(
        update={
            "name": f"{plain.name}-lesions",
            "init_from": weights_of(plain.runs / plain.name),
            "steps": steps,
            "time_limit_s": LESIONS_SHARE * plain.time_limit_s,
            "data": plain.data.model_copy(update={"augment": augment}),
            "optim": plain.optim.model_copy(update={"lr": plain.optim.lr / 2}),
            "validation": plain.validation.model_copy(update=every),
            "checkpoint": plain.checkpoint.model_copy(update=every),
        }
    )


def train_peer(store: Path, work: Path, weights: Path, patient: str, seconds: float) -> None:
    """RED-CNN's best weights in half precision and its curve go to `weights`."""
    run = work / "runs" / f"{PEER}-{patient}"
    redcnn2d.train(Store(store), DOSE, run, seconds)
    if (run / "best.safetensors").exists():
        redcnn2d.halve(run / "best.safetensors", weights / f"{PEER}-{patient}.safetensors")
        shutil.copy(run / "curve.jsonl", weights / f"{PEER}-{patient}.jsonl")


def study_of(store: Store, weights: Path, patient: str) -> Study:
    """Every method on the patient that this store's training leaves out."""
    print(f"{patient}: measuring", file=sys.stderr)
    others = [case.name for case in store.cases if case.split != "test"]
    pairs = [(store.volume(name, dose_name(DOSE)), store.volume(name, FULL_DOSE)) for name in others]
    methods: dict[str, Method] = {LOW: lambda volume: volume.hu}
    methods |= {name: _filter(name, tune(name, pairs)) for name in FILTERS}
    softer = partial(network, strength=STRENGTH)
    for name, kind, load in ((OURS, OURS, network), (SOFTER, OURS, softer), (PEER, PEER, redcnn2d.load)):
        if (path := weights / f"{kind}-{patient}.safetensors").exists():
            methods[name] = load(path)
    return measure(store, StudyConfig(protocol=PROTOCOL, dose=DOSE), methods)


def _filter(name: str, strength: float) -> Method:
    return lambda low: BASELINES[name].filter(low, strength).hu


def figures(studies: dict[str, Study], weights: Path) -> dict[str, Any]:
    """What the last line says, of the methods that every patient has."""
    shared = set.intersection(*(set(study.methods) for study in studies.values()))
    first = next(iter(studies.values()))
    whole = Study("four patients", "", DOSE, first.protocols, first.config)
    whole.rows = [row for study in studies.values() for row in study.rows if row.method in shared]
    means = results.summary(whole, PROTOCOL)
    bias = results.bias(whole)
    worst = {m: max(bias[m].items(), key=lambda item: abs(item[1].mean or 0)) for m in whole.methods}
    seen = {
        shape: {m: [s.detection[m][shape].d_prime for s in studies.values()] for m in whole.methods}
        for shape in (BALL, ROD)
    }
    d_prime = {
        shape: {m: estimate(values, list(studies)) for m, values in by_method.items()}
        for shape, by_method in seen.items()
    }
    lead = {
        **{
            m: _lead({k: [row.figures[PROTOCOL][m] for row in whole.of(k)] for k in whole.methods}, studies)
            for m in ("rmse_hu", "ssim")
        },
        **{f"d_prime_{shape}": _lead(by_method, studies) for shape, by_method in seen.items()},
    }
    return {
        "protocol": str(whole.protocols[0]),
        "patients": list(studies),
        "rmse": {m: asdict(means[m]["rmse_hu"]) for m in whole.methods},
        "ssim": {m: asdict(means[m]["ssim"]) for m in whole.methods},
        "d_prime": {shape: {m: asdict(e) for m, e in found.items()} for shape, found in d_prime.items()},
        "ours_minus": lead,
        "worst_bias_hu": {m: {"tissue": t, **asdict(e)} for m, (t, e) in worst.items()},
        "goals": _goals(means, d_prime, worst) if {OURS, PEER} <= shared else None,
        "not_measured": [m for m in (OURS, PEER) if m not in shared],
        "at_plateau": {p: redcnn2d.at_plateau(weights / f"{PEER}-{p}.jsonl") for p in studies},
    }


def _lead(by_method: dict[str, list[float]], patients: Iterable[str]) -> dict[str, Any]:
    """Ours less low dose, and less RED-CNN, on the same patients."""
    ours = {
        t.b: t
        for t in paired_tests({m: by_method[m] for m in (OURS, LOW, PEER) if m in by_method}, list(patients))
        if t.a == OURS
    }
    return {name: asdict(t.difference) for name, t in ours.items()}


def _goals(means: Any, d_prime: Any, worst: Any) -> dict[str, bool]:
    rmse, ssim = (
        {m: row[key].mean for m, row in means.items() if m != SOFTER} for key in ("rmse_hu", "ssim")
    )
    kept = {
        f"d_prime_kept_{shape}": found[OURS].mean >= max(found[LOW].mean, found[PEER].mean)
        for shape, found in d_prime.items()
    }
    return {
        "first_in_rmse": min(rmse, key=rmse.__getitem__) == OURS,
        "first_in_ssim": max(ssim, key=ssim.__getitem__) == OURS,
        **kept,
        "bias_below_2_hu": abs(worst[OURS][1].mean) < 2,
    }


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        sys.exit(f"bench/quality.py: {e}")
