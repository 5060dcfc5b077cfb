"""A cohort: one network for all of its cases, whatever becomes of the weights and however often it is started."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ldct_dist.cli import app
from ldct_dist.denoise import cohort
from ldct_dist.denoise.claim import MADE_BY
from ldct_dist.denoise.cohort import denoise_cohort
from ldct_dist.denoise.volumes import SeriesDenoiser
from ldct_dist.errors import UserError
from ldct_dist.models.registry import ModelConfig, build
from ldct_dist.models.weights import save_weights
from networks import random_network
from synthetic_dicom import write_phantoms


@pytest.fixture
def source(tmp_path):
    return write_phantoms(tmp_path / "in", "abc")


@pytest.fixture
def weights(tmp_path):
    save_weights(tmp_path / "w.safetensors", build(ModelConfig(size="xs")))
    return tmp_path / "w.safetensors"


def cases(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir() if not path.name.startswith("."))


def test_weights_that_are_pruned_meanwhile_denoise_the_rest_all_the_same(source, weights, tmp_path):
    report = denoise_cohort(
        SeriesDenoiser.load(weights),
        source,
        tmp_path / "out",
        progress=lambda _: weights.unlink(missing_ok=True),
    )
    assert (report.written, report.refused) == (["a", "b", "c"], [])


def test_cases_of_other_weights_are_not_taken_for_these_nor_added_to(source, weights, tmp_path):
    out = tmp_path / "out"
    denoise_cohort(SeriesDenoiser.load(weights), source, out, part=(0, 2))
    save_weights(weights, random_network("unet3d", gain=0.5))
    with pytest.raises(
        UserError, match=r"denoised by unet3d-xs, weights sha256 \w+, this would be by unet3d"
    ):
        denoise_cohort(SeriesDenoiser.load(weights), source, out, part=(1, 2))
    assert cases(out) == ["a", "c"]


def test_the_same_weights_go_on_where_they_were_but_not_in_another_precision_or_strength(
    source, weights, tmp_path
):
    out = tmp_path / "out"
    denoise_cohort(SeriesDenoiser.load(weights), source, out, part=(0, 2))
    report = denoise_cohort(SeriesDenoiser.load(weights), source, out)
    assert (report.written, report.skipped) == (["b"], ["a", "c"])
    with pytest.raises(UserError, match="in bf16"):
        denoise_cohort(SeriesDenoiser.load(weights, bf16=True), source, out)
    with pytest.raises(UserError, match=r"at strength 0\.85"):
        denoise_cohort(SeriesDenoiser.load(weights, strength=0.85), source, out)


def test_a_case_has_a_line_as_soon_as_it_is_whole(source, weights, tmp_path):
    done = CliRunner().invoke(
        app, ["denoise", str(weights), str(source), str(tmp_path / "out"), "--part", "1/3"]
    )
    assert done.output.splitlines() == [
        "b: denoised",
        f"cases: 1 denoised, 0 there already -> {tmp_path / 'out'}",
    ]


def test_cases_that_nothing_is_known_of_are_not_added_to(source, weights, tmp_path):
    (tmp_path / "out" / "a").mkdir(parents=True)
    with pytest.raises(UserError, match="an unknown network"):
        denoise_cohort(SeriesDenoiser.load(weights), source, tmp_path / "out")
    assert not (tmp_path / "out" / MADE_BY).exists()


def test_a_case_that_is_refused_leaves_the_others(source, weights, tmp_path):
    (source / "b" / "slice-001.dcm").unlink()
    report = denoise_cohort(SeriesDenoiser.load(weights), source, tmp_path / "out")
    assert report.written == ["a", "c"]
    assert report.refused[0].startswith("b: ")
    with pytest.raises(UserError, match="holds one folder for each case"):
        cohort.cases_of(source / "a")


def test_a_hidden_folder_is_no_case(source, weights, tmp_path):
    """A file system's snapshots, say, or what a start that was killed had written of a case."""
    (source / ".snapshot").mkdir()
    shutil.copytree(source / "a", source / ".writing-a-01234567")
    report = denoise_cohort(SeriesDenoiser.load(weights), source, tmp_path / "out")
    assert (report.written, report.refused) == (["a", "b", "c"], [])


def test_an_output_among_the_cases_would_be_one_of_them(source, weights):
    with pytest.raises(UserError, match="choose a folder outside"):
        denoise_cohort(SeriesDenoiser.load(weights), source, source / "out")
    assert cases(source) == ["a", "b", "c"]


def test_a_case_that_another_start_makes_meanwhile_is_there_already(source, weights, tmp_path):
    """As where an array is submitted again while some of its tasks still run."""
    out, denoiser = tmp_path / "out", SeriesDenoiser.load(weights)

    class Overtaken(SeriesDenoiser):
        def __call__(self, case, *out_and_more):
            denoise_cohort(denoiser, source, out)
            return super().__call__(case, *out_and_more)

    slow = Overtaken(denoiser.model, denoiser.name)
    report = denoise_cohort(slow, source, out)
    assert (report.written, report.skipped, report.refused) == ([], ["a", "b", "c"], [])
    assert sorted(path.name for path in out.iterdir()) == [MADE_BY, "a", "b", "c"]


def test_a_start_takes_nothing_from_one_that_is_at_the_same_case(source, weights, tmp_path):
    """A case of two series had but the second, if another start began it in between."""
    out, denoiser = tmp_path / "out", SeriesDenoiser.load(weights)
    shutil.copytree(source / "b", source / "a" / "second")

    class Killed(SeriesDenoiser):
        def __call__(self, *_):
            raise KeyboardInterrupt

    class Joined(SeriesDenoiser):
        def __call__(self, case, partial, *more):
            def join(_: str) -> None:
                with pytest.raises(KeyboardInterrupt):
                    denoise_cohort(Killed(self.model, self.name), source, out)

            return super().__call__(case, partial, notice=join)

    denoise_cohort(Joined(denoiser.model, denoiser.name), source, out, part=(0, 3))
    assert cases(out / "a") == ["series-001", "series-002"]


def test_what_killed_starts_left_of_a_case_is_gone_once_it_is_whole(source, weights, tmp_path):
    out = tmp_path / "out"
    for left in (
        ".writing-a-01234567",
        ".writing-a-c-01234567",
    ):  # the second: of another case, which may be in the making
        (out / left).mkdir(parents=True)
    denoise_cohort(SeriesDenoiser.load(weights), source, out, part=(0, 3))
    assert sorted(path.name for path in out.iterdir()) == [MADE_BY, ".writing-a-c-01234567", "a"]
