"""What `ldct-dist evaluate` is asked for, checked; and its findings, of which a start makes those that are not kept."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ldct_dist import config as configs
from ldct_dist.checkpoint.load import weights_of
from ldct_dist.errors import UserError, memory_for
from ldct_dist.evaluate.baselines import baseline_named
from ldct_dist.evaluate.classify import Training, classify, patient_folds
from ldct_dist.evaluate.examination import CaseFindings, Examination, Findings, Say, findings_from_plain
from ldct_dist.evaluate.kept import FOLDER, Kept
from ldct_dist.evaluate.methods import FULL, LOW, Method, network, peers_beside, source_hash, tuned_baselines
from ldct_dist.evaluate.protocols import protocol_named
from ldct_dist.evaluate.results import software
from ldct_dist.evaluate.study import StudyConfig
from ldct_dist.evaluate.tasks import Cohort, joined, of_cases, read_labels
from ldct_dist.files import refuse_inside, refuse_unwritable
from ldct_dist.models.weights import origin_of, weights_hash
from ldct_dist.store.privacy import default_key_path, key_id, load_key
from ldct_dist.store.reader import Store

_TUNED_ON = 4  # cases


class Evaluation:
    """What `ldct-dist evaluate` is asked for, checked: all mistakes that can be found before anything is measured.

    weights: files, checkpoints or runs, by the names that tables call them, to which bf16 and strength are added. out:
    folder of the report, None for a table alone. baselines, peers and labels as the command has them. key: by which labels
    of patients find the store's cases; STORE.key unless given. shown: of how many cases the report shows images.
    Raises UserError.
    """

    def __init__(
        self,
        weights: Mapping[str, Path],
        store: Path,
        options: Mapping[str, Any],
        out: Path | None = None,
        baselines: Sequence[str] = (),
        peers: Sequence[str] = (),
        labels: Path | None = None,
        key: Path | None = None,
        shown: int = 3,
    ) -> None:
        files = {name: weights_of(path) for name, path in weights.items()}
        config = configs.validate(StudyConfig, dict(options), "evaluate")
        protocol_named(config.protocol)
        manner = " in bf16" if config.bf16 else ""
        manner += f" at strength {config.strength:g}" if config.strength < 1 else ""
        self.names = list(weights)
        self.weights = {name + manner: path for name, path in files.items()}
        for name in {LOW, FULL} & self.weights.keys():
            raise UserError(
                f"{name}: an image of every case is called so in the tables; name the weights NAME=PATH"
            )
        self.peers = peers_beside(self.weights, peers)
        self.store = Store(store)
        if out is None and labels is not None:
            raise UserError("--labels: classification is part of the report; add --out FOLDER")
        if labels is None and key is not None:
            raise UserError("--key: only labels of patients need it; add --labels FILE.csv, or leave it out")
        key = key or default_key_path(self.store.path)
        self.cohort = _cohort(self.store, config, labels, key) if labels else None
        if out is not None:
            refuse_inside(out, self.store.path)
            refuse_unwritable(out)
            refuse_unwritable(out / FOLDER)  # it may be another person's, whose start was stopped
        self.out, self.baselines = out, baselines if out else ()
        for name in self.baselines:
            baseline_named(name)
        self.examination = Examination(
            self.store, config, physics=out is not None, shown=shown, cohort=self.cohort
        )
        if self.baselines:
            _to_tune_on(self.store, config)
        self.hashes = {name: weights_hash(path) for name, path in self.weights.items()}
        self.origins = {name: origin for name, path in self.weights.items() if (origin := origin_of(path))}
        self.kept: Kept | None = None
        if out is not None:
            self.kept = Kept(out / FOLDER, self._made_of(shown))

    def measured(self, part: tuple[int, int], say: Say, tell: Callable[[str], None]) -> dict[str, Findings]:
        """The findings of every n-th item from the i-th; part: (i, n). `tell` hears of those that were kept."""
        found: dict[str, Findings] = {}
        missing = []
        for item in self.examination.items[part[0] :: part[1]]:
            kept = self.kept.find(item) if self.kept else None
            if kept is None:
                missing.append(item)
            else:
                found[item] = findings_from_plain(kept)
        if found:
            tell(f"going on: {len(found)} of {len(found) + len(missing)} were measured before")
        methods = self._methods(say) if missing else {}
        for item in missing:
            with memory_for(item):
                findings = self.examination.examine(item, methods, say)
            if self.kept is not None:  # and so the same, whether it was read from a file or not
                findings = findings_from_plain(self.kept.keep(item, asdict(findings)))
            found[item] = findings
        return found

    def classified(self, found: Mapping[str, Findings]) -> dict[str, Any] | None:
        """What a classifier makes of the labelled slices; None if there are no labels."""
        if self.cohort is None:
            return None
        samples = [case.samples for case in found.values() if isinstance(case, CaseFindings)]
        return classify(joined([own for own in samples if own is not None]))

    def _methods(self, say: Say) -> dict[str, Method]:
        """The low dose itself, then the baselines, the peers and the networks, by name. Raises UserError as `network`
        and `tuned_baselines` do."""
        config = self.examination.config
        # Damaged weights are refused before filters are tuned, which takes minutes.
        networks = {name: network(path, config.bf16, config.strength) for name, path in self.weights.items()}
        tuned: dict[str, Method] = {}
        if self.baselines:
            say("tuning filters", ", ".join(self.baselines))
            pairs = [self.examination.volumes(name) for name in _to_tune_on(self.store, config)]
            tuned = tuned_baselines(self.baselines, pairs)
        return {LOW: lambda low: low.hu, **tuned, **self.peers, **networks}

    def _made_of(self, shown: int) -> dict[str, Any]:
        """All that findings depend on, as far as it can be told: not what a peer reads."""
        labels = self.cohort.labels if self.cohort else {}
        return {
            "software": software(),
            "store": self.store.fingerprint,
            "config": self.examination.config.model_dump(),
            "weights": self.hashes,
            "code_of_others": self.origins,
            "baselines": list(self.baselines),
            "peers": {name: source_hash(peer) for name, peer in self.peers.items()},
            "shown": shown,
            "labels": sorted(
                (case, str(at), label) for case, own in labels.items() for at, label in own.items()
            ),
        }


def _to_tune_on(store: Store, config: StudyConfig) -> list[str]:
    """A few cases of other splits. Raises UserError if there is none."""
    others = np.flatnonzero(store.splits != config.split)
    if not len(others):
        raise UserError(
            f"{store.path}: every case is in split {config.split!r}, so none is left to tune baselines on; do "
            "without them: --baselines ''"
        )
    spread = others[np.linspace(0, len(others) - 1, min(_TUNED_ON, len(others))).astype(int)]
    return [store.cases[int(i)].name for i in spread]


def _cohort(store: Store, config: StudyConfig, labels: Path, key: Path) -> Cohort:
    """The cohort of the labels. Raises UserError for all that can be wrong with them, before anything is denoised."""
    known, unit = read_labels(labels)
    if unit == "patient":
        if not os.path.exists(key):  # Path.exists would raise PermissionError
            raise UserError(
                f"{labels}: labels of patients need the store's key, and {key} is not there, or may not be read; say "
                "where it is by --key, or label cases"
            )
        secret = load_key(key)
        if not {key_id(secret), None} & set(store.table["key_id"].to_pylist()):
            raise UserError(f"{labels}: {key} is not the key of {store.path}; give the right file by --key")
        known = of_cases(known, {case.name: case.patient for case in store.cases}, secret)
    cases = [store.cases[int(i)] for i in store.split(config.split)]
    window = protocol_named(config.protocol).window
    cohort = Cohort(known, window, {case.name: case.patient for case in cases})
    own = [(case.patient, label) for case in cases for _, label in cohort.chosen(case.name, case.shape[0])]
    whose, what = map(np.array, zip(*own, strict=True))
    patient_folds(what, whose, Training().folds, Training().seed)
    return cohort
