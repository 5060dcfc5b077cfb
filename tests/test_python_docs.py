"""What docs/python.md shows works, as it stands there but for paths, sizes and the cluster."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter

from ldct_dist import find_series, read_series
from runs import write_config
from synthetic_dicom import Options, write_series

DOCS = Path(__file__).parents[1] / "docs" / "python.md"
BLOCKS = re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL)


def body(seed: int) -> np.ndarray:
    """int16 HU (8, 96, 96): soft tissue in air, with the noise of a scan."""
    y, x = np.mgrid[-48:48, -48:48]
    grain = gaussian_filter(np.random.default_rng(seed).normal(0, 1, (8, 96, 96)), (0, 0.8, 0.8))
    inside = x**2 + y**2 < 44**2
    return np.rint(np.where(inside, 40, -990) + 12 * grain / grain.std()).astype(np.int16)


def test_the_examples_run_one_after_the_other(tmp_path, monkeypatch, capsys):
    for i in range(4):
        write_series(tmp_path / f"data/dicom/{i}", body(i), Options(patient=f"P{i}", seed=str(i)))
    (tmp_path / "data/patient-7").symlink_to("dicom/1")
    (tmp_path / "configs").mkdir()
    store = tmp_path / "scratch/ct.zarr"
    store.parent.mkdir()
    written = write_config(tmp_path / "configs", store, name="mine", runs="runs", steps=20)
    written.rename(tmp_path / "configs/mine.yaml")
    monkeypatch.chdir(tmp_path)
    here = {
        '"/data/': f'"{tmp_path}/data/',
        '"/scratch/': f'"{tmp_path}/scratch/',
        "(32, 96, 96)": "(8, 32, 32)",
        'nodes=2, gpus_per_node=4, time="24:00:00", partition="gpu"': 'cluster="local", ntasks_per_node=1',
    }
    for text in here:
        assert any(text in block for block in BLOCKS)
    names: dict = {}
    for block in BLOCKS:
        for text, instead in here.items():
            block = block.replace(text, instead)
        exec(compile(block, str(DOCS), "exec"), names)
    assert set(capsys.readouterr().out.splitlines()[-1].split("'")[1::2]) == {"rmse_hu", "psnr_db", "ssim"}
    assert names["loss"].isfinite()
    assert names["low_corner"].shape == (8, 64, 64)
    for made in ("data/patient-7-quarter", "data/patient-7-denoised"):
        assert read_series(find_series(tmp_path / made)[0][0]).shape == (8, 96, 96)


def test_every_public_name_is_shown_or_is_an_error_or_a_type():
    import ldct_dist

    shown = set(re.findall(r"\w+", DOCS.read_text()))
    assert set(ldct_dist.__all__) - shown <= {"RunConfig", "Volume"}
