"""Validation shared out over ranks, each a thread here."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pytest

from ldct_dist import config as configs
from ldct_dist.denoise.tiles import NotFiniteError, denoise_volume
from ldct_dist.errors import UserError
from ldct_dist.evaluate.metrics import evaluate_volume
from ldct_dist.train import validation
from ldct_dist.train.config import RunConfig
from ldct_dist.train.validation import validate
from ldct_dist.world import World
from networks import random_network
from runs import write_config
from stores import make_store

SHAPES = {"train": (8, 32, 32), "val": [(6, 32, 32), (7, 36, 32), (5, 32, 40)]}


@dataclass(frozen=True)
class Beside(World):
    """A rank beside others in this process, all of which come to `meeting` with what they have in `table`."""

    meeting: threading.Barrier = field(default_factory=lambda: threading.Barrier(1))
    table: dict = field(default_factory=dict)

    def gather(self, item, group=None):
        self.table[self.rank] = item
        self.meeting.wait(60)
        items = [self.table[rank] for rank in range(self.size)]
        self.meeting.wait(60)
        return items


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    shapes = [SHAPES["train"], *SHAPES["val"]]
    return make_store(tmp_path_factory.mktemp("data") / "ct.zarr", shapes, ["train", "val", "val", "val"])


@pytest.fixture
def validated(store, tmp_path):
    """What `validate` returns on each of so many ranks, or raises."""

    def on(ranks, *overrides, go_on=lambda rank, seconds: True):
        config = configs.read(RunConfig, write_config(tmp_path, store.path), overrides)
        meeting, table = threading.Barrier(ranks), {}
        network = random_network("redcnn3d")

        def one(rank):
            world = Beside(rank, ranks, meeting=meeting, table=table)
            try:
                return validate(
                    network, store, config, world, lambda seconds: go_on(rank, seconds), lambda *_: None
                )
            except UserError as e:
                return str(e)

        with ThreadPoolExecutor(ranks) as threads:
            return list(threads.map(one, range(ranks)))

    return on


def by_hand(store, names):
    """Means over these cases of the figures of each."""
    rows = []
    for name in names:
        low, full = store.volume(name, "0.25"), store.volume(name, "1.00")
        rows.append(evaluate_volume(denoise_volume(random_network("redcnn3d"), low.hu), full.hu, "abdomen"))
        rows[-1]["low_dose_rmse_hu"] = evaluate_volume(low.hu, full.hu, "abdomen")["rmse_hu"]
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


NAMES = ["case-001", "case-002", "case-003"]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_any_number_of_ranks_finds_the_means_over_all_cases_to_the_last_digit(store, validated, ranks):
    found = validated(ranks)
    expected = by_hand(store, NAMES)
    for each in found:
        assert (each.figures, each.failed) == (expected, [])
        assert each.rmse_hu == expected["rmse_hu"]
        basis = {"store": store.fingerprint, "split": "val", "cases": 3, "protocol": "abdomen"}
        assert each.basis == basis
        assert each.seconds > 0
    first, *others = (each.first for each in found)
    assert others == [None] * (ranks - 1)
    assert list(first) == ["low dose", "denoised", "full dose"]
    low = store.volume(NAMES[0], "0.25")
    np.testing.assert_array_equal(first["low dose"].hu, low.hu)
    np.testing.assert_array_equal(first["full dose"].hu, store.volume(NAMES[0], "1.00").hu)
    np.testing.assert_array_equal(first["denoised"].hu, denoise_volume(random_network("redcnn3d"), low.hu))


def test_as_many_cases_as_the_config_says(store, validated):
    for each in validated(2, "validation.max_cases=2"):
        assert each.figures == by_hand(store, NAMES[:2])
        assert each.basis["cases"] == 2


def test_one_answer_that_is_not_finite_leaves_no_mean(validated, monkeypatch):
    def denoised(model, hu, **_):
        if hu.shape != SHAPES["val"][0]:
            raise NotFiniteError("gives values that are not finite")
        return hu

    monkeypatch.setattr(validation, "denoise_volume", denoised)
    for each in validated(2):
        assert (each.figures, each.failed, each.rmse_hu) == ({}, NAMES[1:], None)


def test_all_ranks_are_asked_before_each_round_whether_to_go_on(validated):
    """Those without a case, too, or the others would wait for their answer."""
    asked = {0: [], 1: []}
    validated(2, go_on=lambda rank, seconds: asked[rank].append(seconds) or True)
    for rank, seconds in asked.items():
        assert len(seconds) == 2, rank
        assert seconds[0] == 0.0
        assert seconds[1] > 0.0
    rounds = {0: 0, 1: 0}

    def once(rank, seconds):
        rounds[rank] += 1
        return rounds[rank] < 2

    assert validated(2, go_on=once) == [None, None]


@pytest.mark.parametrize("sound", [None, SHAPES["val"][1]])
def test_what_first_goes_wrong_is_raised_on_all_ranks_and_its_rank_measures_no_more(
    validated, monkeypatch, sound
):
    seen = []

    def denoised(model, hu, **_):
        seen.append(hu.shape)
        if hu.shape != sound:
            raise UserError(f"no answer for {hu.shape}")
        return hu

    monkeypatch.setattr(validation, "denoise_volume", denoised)
    line = f"validation on case-001: no answer for {SHAPES['val'][0]}"
    assert validated(2) == [line, line]
    assert sorted(seen) == sorted(SHAPES["val"][:2])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_volumes_are_denoised_in_the_precision_of_the_run(validated, monkeypatch, precision):
    given = []
    monkeypatch.setattr(
        validation, "denoise_volume", lambda model, hu, **options: given.append(options["bf16"]) or hu
    )
    validated(1, f"precision={precision}")
    assert given == [precision == "bf16"] * 3
