"""Networks of other packages: made by name, or refused in one line."""

from __future__ import annotations

import sys

import pytest
import torch

from ldct_dist.config import validate
from ldct_dist.errors import UserError
from ldct_dist.models import installed
from ldct_dist.models.registry import ModelConfig, build, outline
from ldct_dist.models.weights import load_weights, origin_of, save_weights
from your_own import NAME, install

PROJECT = '[project]\nname = "my-nets"\nversion = "0.1"\n[project.entry-points."ldct_dist.networks"]\n'
SMALL = {"width": 4, "depth": 3}
HEAD = "import torch\nfrom torch import nn\n"
CLASS = HEAD + "class Net(nn.Module):\n    radius, stride = (1, 1, 1), (1, 1, 1)\n"
INIT = "    def __init__(self):\n        super().__init__()\n        "


@pytest.mark.usefixtures("my_nets")
def test_an_installed_network_is_a_denoiser_like_any_other():
    config = validate(ModelConfig, {"name": NAME, "options": SMALL}, "run.yaml")
    model = build(config)
    assert (model.radius, model.stride, model.widest, config.label) == ((3, 4, 4), (1, 1, 1), 4.0, NAME)
    hu = torch.randint(-1024, 3072, (2, 1, 6, 9, 11)).float()
    assert torch.equal(model(hu), hu)
    model(hu).square().sum().backward()
    assert model.network.last.weight.grad.any()


@pytest.mark.usefixtures("my_nets")
def test_its_settings_are_its_options_and_nobody_elses():
    def refused(words: str, **given: object) -> None:
        with pytest.raises(UserError, match=words):
            validate(ModelConfig, given, "run.yaml")

    refused(
        "size: dncnn3d has no such setting; leave it out, its own are model.options.KEY=VALUE",
        name=NAME,
        size="m",
    )
    refused("thick_slices: dncnn3d has no such setting", name=NAME, thick_slices=True)
    refused("options: unet3d has no such setting$", options=SMALL)
    refused("there is no dncnn, but unet3d, nafnet3d, redcnn3d, dncnn3d", name="dncnn")


def test_weights_name_the_package_that_they_need(tmp_path, my_nets):
    path = tmp_path / "w.safetensors"
    save_weights(path, build(ModelConfig(name=NAME, options=SMALL)))
    assert load_weights(path).config.options == SMALL
    first = origin_of(path)
    assert first.startswith("my-nets 0.1, source sha256 ")
    with open(my_nets, "a") as f:
        f.write("# changed\n")
    assert origin_of(path) == first  # which is what this process has imported
    installed.origin.cache_clear()
    assert origin_of(path) != first
    for file in my_nets.parent.glob("*.dist-info/*"):
        file.unlink()
    with pytest.raises(UserError, match=rf"for a network of {first}.* \(there is no dncnn3d, but "):
        load_weights(path)


def test_weights_lead_to_no_code_but_what_is_installed(tmp_path, monkeypatch):
    """They may come from anybody, and the folder that they come in may be the one that Python starts from."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')\n")
    for name in ("evil", "evil:Net", "evil.Net", "os:system"):
        with pytest.raises(UserError, match="there is no "):
            validate(ModelConfig, {"name": name, "options": {"command": "true"}}, "w.safetensors")
    assert "evil" not in sys.modules


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (HEAD, "model.name=net: its package has no my_nets:Net"),
        ("import no_such_module", "no_such_module"),
        (CLASS + INIT + "raise ValueError('too wide')\n", "net cannot be made with them: too wide"),
        (CLASS + INIT + "torch.ones(1).item()\n", "net cannot be made with them: .*meta"),
        (HEAD + "def Net(): return 3\n", "gives int, and no torch.nn.Module"),
        (HEAD + "def Net(): return nn.Conv3d(2, 1, 3, padding=1)\n", "its radius is None"),
        (HEAD + "def Net(): return torch.compile(nn.Conv3d(2, 1, 3))\n", "is compiled already"),
        (CLASS.replace("(1, 1, 1)\n", "2\n"), "its stride is 2; it has to be a tuple"),
        (CLASS, "it has no weights"),
        (CLASS + INIT + "self.n = nn.BatchNorm3d(2)\n", "n.running_mean is a tensor that nothing saves"),
        (CLASS + INIT + "self.k = torch.ones(3)\n", "k is a tensor that nothing saves"),
        (
            CLASS + INIT + "self.k = nn.utils.weight_norm(nn.Conv3d(2, 1, 1))\n",
            "k.weight is a tensor that nothing",
        ),
        (
            CLASS + INIT + "self.c = nn.Conv3d(2, 1, 1).requires_grad_(False)\n",
            "c.weight cannot be trained as it is",
        ),
        (CLASS + INIT + "self.c = nn.LazyConv3d(1, 1)\n", "c.weight cannot be trained as it is"),
        (CLASS + INIT + "self.c = nn.Conv3d(2, 1, 1).bfloat16()\n", "weights have a shape, are float32"),
        (
            CLASS + INIT + "self.a = nn.Linear(2, 2); self.b = nn.Sequential(self.a)\n",
            "a.weight and b.0.weight are one",
        ),
        (
            CLASS
            + INIT
            + "self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2); self.b.weight = self.a.weight\n",
            "a.weight and b.weight are one",
        ),
        (
            CLASS + INIT + "self.last = nn.Conv3d(2, 1, 1, bias=False)\n",
            "its last has weight; it has to have weight and",
        ),
        (CLASS + INIT + "self.last = nn.Sequential(nn.Conv3d(2, 1, 1))\n", "its last has no weights"),
    ],
)
def test_what_is_no_network_is_refused_in_one_line(tmp_path, monkeypatch, source, words):
    install(tmp_path, monkeypatch, source, PROJECT + 'net = "my_nets:Net"\n')
    with pytest.raises(UserError, match=words):
        outline(ModelConfig(name="net"))


def test_options_that_it_does_not_take_are_named(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, CLASS + INIT + "pass\n", PROJECT + 'net = "my_nets:Net"\n')
    with pytest.raises(UserError, match=r"model.options=\{'wide': 3\}: net takes others .*'wide'"):
        outline(ModelConfig(name="net", options={"wide": 3}))


def test_a_name_that_two_packages_offer_is_refused(tmp_path, monkeypatch):
    for name in ("my-nets", "your-nets"):
        project = PROJECT.replace("my-nets", name) + 'net = "my_nets:Net"\n'
        install(tmp_path / name, monkeypatch, CLASS, project)
    with pytest.raises(
        UserError, match=r"model.name=net: several packages have one \(my-nets, your-nets\); uninstall"
    ):
        outline(ModelConfig(name="net"))


def test_a_fault_in_the_other_package_is_left_for_whoever_writes_it(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, CLASS + INIT + "len(3)\n", PROJECT + 'net = "my_nets:Net"\n')
    with pytest.raises(TypeError, match="has no len"):
        installed.make_network("net", {})


@pytest.mark.parametrize("place", ["nets_of_mine:Net", "nets_of_mine:made", "nets_of_mine.parts:Net"])
def test_where_a_network_comes_from_is_told_by_all_sources_of_its_package(tmp_path, monkeypatch, place):
    install(tmp_path, monkeypatch, "", PROJECT + f'net = "{place}"\n')
    package = tmp_path / "nets_of_mine"
    package.mkdir()
    (package / "parts.py").write_text(CLASS)
    (package / "__init__.py").write_text(
        "from functools import partial\nfrom .parts import Net\nmade = partial(Net)\n"
    )
    installed.origin.cache_clear()
    first = installed.origin(installed.NETWORKS, "net")
    (package / "parts.py").write_text(CLASS + "# changed\n")
    installed.origin.cache_clear()
    assert installed.origin(installed.NETWORKS, "net") != first
    for name in ("nets_of_mine", "nets_of_mine.parts"):
        del sys.modules[name]
