from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from ldct_dist.cli import app
from ldct_dist.ct.phantom import body
from ldct_dist.ct.volume import AIR_HU
from ldct_dist.denoise.tiles import denoise_volume
from ldct_dist.errors import UserError
from ldct_dist.evaluate.baselines import BASELINES
from ldct_dist.evaluate.methods import apply, network, peer, tuned_baselines
from ldct_dist.models.weights import load_weights, save_weights
from networks import random_network
from stores import make_store


@pytest.fixture(scope="module")
def pair():
    full = body((4, 80, 80), (4.0, 4.0, 4.0), seed=0)
    noise = np.random.default_rng(0).normal(0, 25, full.shape)
    low = np.where(full.hu == AIR_HU, AIR_HU, np.rint(full.hu + noise).clip(AIR_HU + 1))
    return replace(full, hu=low.astype(np.int16)), full


@pytest.fixture(scope="module")
def tuned(pair):
    return tuned_baselines(list(BASELINES), [pair])


def test_every_tuned_filter_beats_doing_nothing_and_keeps_padding(pair, tuned):
    low, full = pair

    def rmse(hu):
        return np.sqrt(np.square(hu.astype(float) - full.hu)[full.hu > AIR_HU].mean())

    assert len(tuned) == len(BASELINES)
    for name, method in tuned.items():
        hu = apply(name, method, low)
        assert rmse(hu) < 0.97 * rmse(low.hu), name
        assert (hu[low.hu == AIR_HU] == AIR_HU).all(), name


def test_a_label_says_the_strength(tuned):
    assert all(label.endswith((" mm)", " x noise)")) for label in tuned)


def test_a_peer_is_any_function_of_a_volume(pair, tmp_path, monkeypatch):
    (tmp_path / "my_networks.py").write_text("def half(volume):\n    return volume.hu / 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    name, method = peer("halved=my_networks:half")
    assert name == "halved"
    assert apply(name, method, pair[0])[0, 40, 40] == round(pair[0].hu[0, 40, 40] / 2)


def test_mistakes_are_named(pair):
    with pytest.raises(UserError, match="name=module:function"):
        peer("my_networks")
    with pytest.raises(UserError, match="PYTHONPATH"):
        peer("x=no_such_module_anywhere:f")
    with pytest.raises(UserError, match="choose from gaussian, bilateral, nlm, tv"):
        tuned_baselines(["median"], [pair])
    with pytest.raises(UserError, match="same grid"):
        apply("x", lambda volume: volume.hu[1:], pair[0])
    with pytest.raises(UserError, match="not finite"):
        apply("x", lambda volume: volume.hu * np.nan, pair[0])


@pytest.mark.parametrize("name", ["net.safetensors", "low dose", "full dose", "twice"])
def test_no_method_takes_the_name_of_another(tmp_path, monkeypatch, name):
    """Else one of the two would not be in the table, or the low dose would be what a peer made of it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "other_networks.py").write_text("def half(volume):\n    return volume.hu / 2\n")
    save_weights(tmp_path / "net.safetensors", random_network("unet3d", gain=0.5))
    make_store(tmp_path / "ct.zarr", [(8, 40, 40)], ["test"])
    peers = [f"--peer={peer}=other_networks:half" for peer in ("twice", name)]
    done = CliRunner().invoke(app, ["evaluate", "net.safetensors", "ct.zarr", *peers])
    assert isinstance(done.exception, UserError)
    assert f"--peer {name}=" in str(done.exception)
    assert "another" in str(done.exception)


def test_a_network_is_measured_in_the_precision_that_it_is_used_in(pair, tmp_path):
    weights, (low, _) = tmp_path / "net.safetensors", pair
    save_weights(weights, random_network("unet3d", gain=0.5))
    in_fp32, in_bf16 = network(weights)(low), network(weights, bf16=True)(low)
    assert np.array_equal(in_bf16, denoise_volume(load_weights(weights), low.hu, bf16=True))
    assert not np.array_equal(in_bf16, in_fp32)


def test_a_table_says_that_a_network_calculated_in_bf16(tmp_path):
    weights = tmp_path / "net.safetensors"
    save_weights(weights, random_network("unet3d", gain=0.5))
    make_store(tmp_path / "ct.zarr", [(8, 40, 40)], ["test"])
    done = CliRunner().invoke(app, ["evaluate", str(weights), str(tmp_path / "ct.zarr"), "--bf16"])
    assert done.exit_code == 0, done.exception
    assert "in bf16" in done.output
