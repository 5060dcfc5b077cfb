"""The report as a reader meets it: files on disk, and the page in a browser."""

from __future__ import annotations

import base64
import csv
import errno
import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import skimage
from scipy.ndimage import gaussian_filter
from typer.testing import CliRunner

import ldct_dist
from ldct_dist.cli import app
from ldct_dist.ct.phantom import body
from ldct_dist.ct.volume import AIR_HU, Volume
from ldct_dist.errors import UserError
from ldct_dist.evaluate.physics.nps import noise_power
from ldct_dist.evaluate.physics.ttf import Transfer
from ldct_dist.evaluate.protocols import protocol_named
from ldct_dist.evaluate.report import tables
from ldct_dist.evaluate.report.page import write_report
from ldct_dist.evaluate.study import Row, Study, StudyConfig
from ldct_dist.models.weights import save_weights
from ldct_dist.store import layout
from networks import random_network

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt install chromium")


def grainy(clean: Volume, std: float, seed: int) -> Volume:
    """`clean` with noise that neighbours share, as a soft kernel makes it."""
    noise = gaussian_filter(np.random.default_rng(seed).normal(size=clean.shape), (0, 0.7, 0.7))
    hu = np.rint(clean.hu + noise * std / noise.std()).clip(AIR_HU + 1)
    return Volume(np.where(clean.hu == AIR_HU, AIR_HU, hu).astype(np.int16), clean.spacing)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    layout.create(folder / "ct.zarr")
    for i, split in enumerate(("train", "test", "test")):
        full = grainy(body((8, 112, 112), (4.0, 3.0, 3.0), seed=i), 8, seed=i)
        low = grainy(full, 14, seed=10 + i)
        layout.write_case(
            folder / "ct.zarr", f"case-{i}", {1.0: full, 0.25: low}, patient=f"patient-{i}", split=split
        )
    layout.finalise(folder / "ct.zarr")
    weights = folder / "<i>net.safetensors"
    save_weights(weights, random_network("unet3d", gain=0.3))
    arguments = [
        "evaluate",
        str(weights),
        str(folder / "ct.zarr"),
        "--out",
        str(folder / "out"),
    ]
    options = ["--baselines", "gaussian,tv", "--lesion-mm", "12", "--cases-shown", "1"]
    options += ["--protocol", "ldctbench-abdomen"]
    done = CliRunner().invoke(app, arguments + options)
    assert done.exit_code == 0, done.output
    (folder / "log").write_text(done.output)
    return folder / "out"


def refuse(constant):
    raise AssertionError(f"{constant} is no JSON")


def test_json_holds_every_section_and_no_infinity(report):
    found = json.loads((report / "results.json").read_text(), parse_constant=refuse)
    methods = list(found["summary"]["ldctbench-abdomen"])
    assert methods[0] == "low dose"
    assert [m.split(" ")[0] for m in methods[1:3]] == ["gaussian", "tv"]
    assert methods[3] == "<i>net.safetensors"
    for protocol in ("ldctbench-abdomen", "ldctbench-abdomen-3d"):
        for figures in found["summary"][protocol].values():
            assert set(figures) == {"rmse_hu", "psnr_db", "ssim", "vif"}
            assert figures["rmse_hu"]["low"] <= figures["rmse_hu"]["mean"] <= figures["rmse_hu"]["high"]
    assert abs(found["bias_hu"]["low dose"]["soft"]["mean"]) < 1
    assert found["physics"]["low dose"]["noise_hu"]["mean"] > found["physics"][methods[2]]["noise_hu"]["mean"]
    assert set(found["physics"]["low dose"]["detection"]) == {"ball", "rod"}
    assert found["physics"]["low dose"]["detection"]["rod"]["low"] > 0
    seen = found["physics"]["low dose"]["detection"]["rod"]
    assert seen["present"] == seen["absent"] > 40
    assert found["phantom_case"] in found["scans"]
    assert len(next(iter(found["weights"].values()))) == 16
    assert len(found["physics"]["low dose"]["ttf"]) == 4
    tests = found["tests"]["ldctbench-abdomen"]["ssim"]
    assert len(tests) == 6
    assert {t["difference"]["interval"] for t in tests} == {"Student t"}
    assert {(t["least_p"], t["least_p_holm"]) for t in tests} == {(0.5, 1)}


def test_json_says_with_what_it_was_made(report):
    """All that a number depends on besides the store and the weights, whose hashes stand there as well."""
    found = json.loads((report / "results.json").read_text())
    assert found["versions"]["ldct_dist"] == ldct_dist.__version__
    assert found["versions"]["scikit-image"] == skimage.__version__
    config = found["config"]
    assert (config["split"], config["strength"], config["bf16"], config["lesion_mm"]) == (
        "test",
        1,
        False,
        12,
    )
    assert found["tissues_hu"]["fat"] == [-140, -50]


def test_the_full_doses_noise_power_and_how_low_dose_was_made_are_in_json(equal_images, tmp_path):
    noise = noise_power(np.random.default_rng(0).normal(0, 5, (4, 16, 16)), (1.0, 1.0))
    equal_images.nps = {"oracle": noise, "full dose": noise}
    made = {"made": "simulated", "config": {"photons": 2e5}}
    equal_images.scans["case"] = {
        **dict.fromkeys(("kernel", "kvp", "slice_thickness_mm")),
        **{"spacing_mm": (5.0, 1.0, 1.0), "shape": (8, 16, 16), "low_dose": made},
    }
    write_report(tmp_path, equal_images)
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["full_dose"]["nps_radial"] == found["physics"]["oracle"]["nps_radial"]
    assert len(found["full_dose"]["nps_radial"]) == 9
    assert found["scans"]["case"]["low_dose"] == made
    assert ">simulated</td>" in (tmp_path / "index.html").read_text()


def test_csv_has_a_line_a_case_and_method(report):
    lines = list(csv.DictReader((report / "cases.csv").open()))
    assert len(lines) == 2 * 4
    assert lines[0]["case"] == "case-1"
    scanned = math.pi / 4  # of a slice; the corners count, too, and have no error
    assert float(lines[0]["rmse_hu (ldctbench-abdomen)"]) == pytest.approx(14 * math.sqrt(scanned), rel=0.1)


def test_captions_say_what_is_counted_which_intervals_and_what_p_can_be(report):
    captions = " ".join(
        re.findall(r'<p class="caption">(.*?)</p>', (report / "index.html").read_text(), re.S)
    )
    protocol = "ldctbench-abdomen, window [−150, 249] HU (RMSE, VIF: [−1024, 1900]), padding counted"
    assert captions.count(protocol) == 2  # in 2-D, and case by case
    assert "ldctbench-abdomen-3d, window [−150, 249] HU" in captions
    assert not re.search(r"(?<!\w)-\d", captions)
    assert captions.count("Means over patients, with 95 % intervals (Student t).") == 6
    assert "how far its curves are apart" in (report / "index.html").read_text()
    assert "looks for lesions of 12 mm and +15 HU, balls, and rods across all slices" in captions
    assert "in it.\nTTF and d′: measured on a phantom" in captions  # a paragraph for each measurement
    assert "fat −140 to −50, soft 0 to 120" in captions
    assert re.search(r"across all slices, in (\d+) patches with one and \1 without\.", captions)
    assert "Split test: 2 cases of 2 patients" in (report / "index.html").read_text()
    assert "With 2 patients, p is at least 0.5, and at least 1 when corrected." in captions


def test_one_legend_names_the_curves_of_all_pictures(report):
    page = (report / "index.html").read_text()
    legend = re.search(r'<ul class="legend">(.*?)</ul>', page, re.S)[1]
    drawn = re.findall(r"solid (#\w+)\"></span>([^<]+)", legend)
    assert [name.split(" ")[0] for _, name in drawn][:3] == ["low", "gaussian", "tv"]
    assert drawn[-1][1] == "full dose"
    pictures = [
        base64.b64decode(svg).decode() for svg in re.findall(r'src="data:image/svg\+xml;base64,([^"]+)', page)
    ]
    assert len(pictures) == 4  # no region is flat enough for a noise power spectrum
    assert all(colour in picture for picture in pictures for colour, name in drawn if name != "full dose")


def test_the_page_asks_for_nothing_outside_itself(report):
    page = (report / "index.html").read_text()
    assert re.findall(r"""(?:src|href)=["'](?!data:)[^"']*""", page) == []
    assert "<i>net" not in page  # names are text, never markup
    assert sorted(path.name for path in report.iterdir()) == ["cases.csv", "index.html", "results.json"]


PROBE = """
<script>
const found = {}, opacities = () => [...document.querySelector(".stack").children].map(i => Number(getComputedStyle(i).opacity));
const slide = value => { wipe.value = value; wipe.dispatchEvent(new Event("input")); };
const column = n => [...document.querySelector("tbody").rows].map(row => Number(row.cells[n].dataset.value));
addEventListener("load", () => {
  found.blends = [0, 0.5, 1, 2].map(value => { slide(value); return opacities(); });
  found.drawn = [...document.images].every(i => i.complete && i.naturalWidth > 0);
  found.views = [...view.options].map(o => o.text);
  const before = document.querySelector(".stack").children[1].src;
  view.selectedIndex = 2; view.dispatchEvent(new Event("change"));
  found.changed = document.querySelector(".stack").children[1].src !== before;
  const button = document.querySelectorAll("th button")[1];
  button.click(); found.up = column(1);
  button.click(); found.down = column(1);
  found.planes = document.querySelectorAll(".stack").length;
  const told = document.createElement("pre"); told.id = "told"; told.textContent = JSON.stringify(found);
  document.body.append(told);
});
</script>
"""


def browse(page: Path, *options: str) -> tuple[str, str]:
    """The page's DOM after its scripts have run, and what Chromium logged."""
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += ["--allow-file-access-from-files", f"--user-data-dir={page.parent}/chromium", "--dump-dom"]
    done = subprocess.run([*command, *options, page.as_uri()], capture_output=True, text=True, timeout=120)
    return done.stdout, done.stderr


@needs_chromium
def test_slider_views_and_sorting_work_without_a_console_error(report, tmp_path):
    page = tmp_path / "probed.html"
    page.write_text((report / "index.html").read_text().replace("</body>", PROBE + "</body>"))
    dom, log = browse(page)
    assert "CONSOLE" not in log, log
    found = json.loads(re.search(r'<pre id="told">(.*?)</pre>', dom)[1].replace("&amp;", "&"))
    assert found["blends"] == [[1, 0, 0], [1, 0.5, 0], [1, 1, 0], [1, 1, 1]]
    assert found["drawn"]
    assert found["planes"] == 3
    assert found["changed"]
    assert found["views"][0] == "window [−150, 249] HU"
    assert len(found["views"]) == 5
    # About twice the noise of the low dose; edges of more than 100 HU are beyond the scale.
    assert found["views"][3] == "local standard deviation, of noise and of edges, 0 to 30 HU"
    assert found["up"] == sorted(found["up"])
    assert found["down"] == found["up"][::-1]


@needs_chromium
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_but_tables_scrolls_sideways(report, tmp_path, width):
    # Chromium's own windows do not get as narrow as a telephone; a frame does.
    page = tmp_path / "frame.html"
    page.write_text(
        f'<iframe src="{(report / "index.html").as_uri()}" style="border:0;width:{width}px;height:900px"></iframe>'
        '<pre id="told"></pre><script>addEventListener("load", () => {'
        'const page = document.querySelector("iframe").contentDocument, smallest = Math.min(...[...page.querySelectorAll'
        '("p, td, th, label, figcaption")].map(e => parseFloat(getComputedStyle(e).fontSize)));'
        "told.textContent = [page.documentElement.scrollWidth, smallest].join();});</script>"
    )
    dom, log = browse(page, f"--window-size={width + 40},1000")
    assert "CONSOLE" not in log, log
    wide, smallest = map(float, re.search(r'<pre id="told">(.*?)</pre>', dom)[1].split(","))
    assert wide <= width
    assert smallest >= 12


@pytest.fixture
def equal_images():
    """A study whose one method gives the full dose itself."""
    protocol = protocol_named("ldctbench-abdomen")
    perfect = {"rmse_hu": 0.0, "psnr_db": math.inf, "ssim": 1.0}
    row = Row("case", "patient", "oracle", {protocol.name: perfect}, {"soft": -0.0})
    return Study("store", "0" * 64, 0.25, (protocol,), StudyConfig(), rows=[row], notes=["nothing to note"])


def test_equal_images_have_no_psnr_and_the_page_says_so(equal_images, tmp_path):
    write_report(tmp_path, equal_images)
    found = json.loads((tmp_path / "results.json").read_text(), parse_constant=refuse)
    assert found["cases"][0]["figures"]["ldctbench-abdomen"]["psnr_db"] is None
    page = (tmp_path / "index.html").read_text()
    assert "nothing to note" in page
    assert "padding counted. Of one patient, so without intervals." in page
    assert "Wilcoxon" not in page
    assert "corrected" not in page
    assert "−0.0" not in page
    assert "inf" not in re.sub(r"<style>.*?</style>|<script.*?</script>", "", page, flags=re.S).lower()


def test_a_caption_without_a_phantom_ends_in_a_full_stop(equal_images):
    assert "rods across all slices.\n" in tables.physics(equal_images).caption


def test_a_name_that_is_not_utf_8_does_not_cost_the_report(equal_images, tmp_path):
    equal_images.store = os.fsdecode(b"n\xe9t.zarr")
    write_report(tmp_path, equal_images)
    assert json.loads((tmp_path / "results.json").read_text())["store"] == equal_images.store
    assert r"Evaluation on n\udce9t.zarr" in (tmp_path / "index.html").read_text()


def test_classification_stands_in_the_page_and_in_json(equal_images, tmp_path):
    row = {key: [0.875, 0.75, 0.95] for key in ("auc", "accuracy", "sensitivity", "specificity")}
    perfect = {**row, "auc": [1.0, None, None]}
    ps = {"delong_p": 3e-7, "delong_p_holm": 9e-5, "mcnemar_p": 0.0321, "mcnemar_p_holm": 1.0}
    found = {
        "training": {"folds": 5},
        "samples": 40,
        "patients": 20,
        "images": {"low dose": row, "full dose": perfect},
    }
    found["tests"] = [{"a": "low dose", "b": "full dose", "auc_difference": -0.125, **ps}]
    write_report(tmp_path, equal_images, found)
    page = (tmp_path / "index.html").read_text()
    for words in (
        "0.875 [0.750, 0.950]",
        ">1.000</td>",
        "−0.125",
        ">0.032<",
        ">1</td>",
        "40 samples of 20 patients",
    ):
        assert words in page
    assert page.count("&lt; 0.0001") == 2
    assert "0.0000" not in page
    assert json.loads((tmp_path / "results.json").read_text())["classification"] == found


def test_no_interval_holds_an_rmse_below_0_or_an_ssim_above_1(equal_images, tmp_path):
    figures = [{"rmse_hu": 6.0, "ssim": 0.99}, {"rmse_hu": 50.0, "ssim": 0.5}]
    name = equal_images.protocols[0].name
    equal_images.rows = [
        Row(f"{i}", f"{i}", "method", {name: found}, conspicuous=0.03 * i, noise_hu=1 + 9.0 * i)
        for i, found in enumerate(figures)
    ]
    write_report(tmp_path, equal_images)
    found = json.loads((tmp_path / "results.json").read_text())
    row, physics = found["summary"][name]["method"], found["physics"]["method"]
    assert (row["rmse_hu"]["low"], row["ssim"]["high"]) == (0, 1)
    assert physics["noise_hu"]["low"] == physics["conspicuous"]["low"] == 0
    assert physics["conspicuous"]["high"] <= 1


def test_figures_of_the_training_split_are_told_as_such(equal_images, tmp_path):
    equal_images.config = StudyConfig(split="train")
    write_report(tmp_path, equal_images)
    assert "Split train, on which networks are trained: 1 case" in (tmp_path / "index.html").read_text()


def test_an_edge_that_stays_sharp_up_to_nyquist_sorts_above_those_that_do_not(equal_images):
    frequency = np.array([0.0, 0.2, 0.4])
    low = Row("case", "patient", "low dose", equal_images.rows[0].figures)
    equal_images.rows.append(low)
    equal_images.transfers = {
        "oracle": [Transfer(frequency, np.array([1, 0.9, 0.8]), 100.0)],
        "low dose": [Transfer(frequency, np.array([1, 0.7, 0.3]), 100.0)],
    }
    equal_images.rows.append(Row("case", "patient", "eraser", low.figures))
    equal_images.transfers["eraser"] = [Transfer(frequency, np.full(3, np.nan), 0.0)]
    sharp, dull, none = (row[3] for row in tables.physics(equal_images).rows)
    assert (sharp.text, dull.text, none.text) == ("> 0.40", "0.30", "–")
    assert sharp.value > dull.value


def test_a_disk_that_fills_leaves_the_earlier_report_whole(tmp_path, monkeypatch, equal_images):
    write_report(tmp_path, equal_images)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"index.html", "results.json", "cases.csv"}
    equal_images.note("measured anew")
    write = Path.write_bytes

    def filling(path: Path, content: bytes) -> int:
        if "index.html" in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", filling)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\); make room"):
        write_report(tmp_path, equal_images)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_log_has_a_line_as_each_case_begins(report):
    *_, log = report.parent.joinpath("log").read_text().partition("tuning")
    begun = [line for line in log.splitlines() if line.startswith(("case", "phantom"))]
    assert begun == ["case 1 of 2, case-1", "case 2 of 2, case-2", "phantom"]
