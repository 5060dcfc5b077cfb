from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldct_dist.ct.volume import AIR_HU
from ldct_dist.denoise import tiles as tiles_module
from ldct_dist.denoise.tiles import TILES, denoise_volume, denoised_tiles, tiles
from ldct_dist.errors import UserError
from ldct_dist.models.registry import ModelConfig, build
from networks import random_network
from on_gpu import on_gpu

MODELS = {
    (name, thick): random_network(name, thick_slices=thick)
    for name in ("unet3d", "nafnet3d", "redcnn3d")
    for thick in (False, True)
}
WHOLE = (10_000, 10_000, 10_000)


def noise(shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 300, shape).clip(-1000, 3000).astype(np.int16)


def stitched(model, hu: np.ndarray, tile: tuple[int, int, int]) -> torch.Tensor:
    out = torch.full(hu.shape, torch.nan)
    for write, answer in denoised_tiles(model, hu, tile=tile):
        assert out[write].isnan().all()
        out[write] = answer
    return out


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    shape=st.tuples(*[st.integers(1, 60)] * 3),
    tile=st.tuples(*[st.integers(1, 40)] * 3),
    radius=st.tuples(*[st.integers(0, 30)] * 3),
    stride=st.sampled_from([(1, 1, 1), (1, 8, 8), (2, 4, 4)]),
)
def test_tiles_write_each_voxel_once_and_read_all_it_sees(shape, tile, radius, stride):
    shape = tuple(-(-n // s) * s for n, s in zip(shape, stride, strict=True))
    written = np.zeros(shape, int)
    for t in tiles(shape, tile, radius, stride):
        written[t.write] += 1
        for read, keep, write, n, r, s in zip(t.read, t.keep, t.write, shape, radius, stride, strict=True):
            assert 0 <= read.start <= max(0, write.start - r)
            assert n >= read.stop >= min(n, write.stop + r)
            assert read.start % s == 0
            assert (read.stop - read.start) % s == 0
            assert (read.start + keep.start, read.start + keep.stop) == (write.start, write.stop)
    assert (written == 1).all()


@settings(deadline=None, max_examples=12, derandomize=True)
@given(
    key=st.sampled_from(sorted(MODELS)),
    shape=st.tuples(st.integers(1, 16), st.integers(8, 32), st.integers(90, 130)),
    swapped=st.booleans(),
    tile=st.tuples(st.integers(1, 8), st.integers(16, 50), st.integers(16, 50)),
)
def test_tiled_is_the_whole_volume_everywhere(key, shape, swapped, tile):
    hu = noise(shape).swapaxes(1, 2) if swapped else noise(shape)
    whole = stitched(MODELS[key], hu, WHOLE)
    assert (whole - torch.from_numpy(hu)).abs().max() > 20  # the network does something
    # NaN, where nothing was written, is close to nothing
    torch.testing.assert_close(stitched(MODELS[key], hu, tile), whole, rtol=0, atol=1e-3)


def test_a_halo_one_square_short_would_show():
    """That the property above can fail: the same with a network that sees further than it says."""
    model = random_network("unet3d")
    model.radius = (model.radius[0], model.radius[1] - 8, model.radius[2] - 8)
    hu = noise((2, 16, 200))
    assert (stitched(model, hu, (2, 16, 96)) - stitched(model, hu, WHOLE)).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["unet3d", "nafnet3d", "redcnn3d"])
def test_a_fresh_network_is_the_identity(name):
    hu = np.random.default_rng(1).integers(AIR_HU, 3000, (7, 33, 41)).astype(np.int16)
    assert np.array_equal(denoise_volume(build(ModelConfig(name=name, size="xs")), hu, tile=(3, 16, 16)), hu)


def test_answers_are_rounded_and_padding_stays():
    model = MODELS["unet3d", False]
    hu = noise((3, 20, 24))
    hu[:, :5] = AIR_HU
    answer = denoise_volume(model, hu)
    assert answer.dtype == np.int16
    assert (answer[:, :5] == AIR_HU).all()
    assert np.array_equal(
        answer[:, 5:], stitched(model, hu, WHOLE)[:, 5:].round().clamp(AIR_HU, 32767).short()
    )


@pytest.mark.filterwarnings("error")
def test_an_array_that_is_read_only_is_denoised_without_a_warning():
    hu = np.zeros((4, 16, 16), np.int16)
    hu.setflags(write=False)  # as a file mapped into memory is
    assert np.array_equal(denoise_volume(build(ModelConfig(size="xs")), hu), hu)


def test_air_whose_noise_is_cut_off_is_denoised():
    """Specks at AIR_HU are a scan's, in whichever tile they lie."""
    model = build(ModelConfig(name="redcnn3d", size="xs"))
    torch.nn.init.constant_(model.network.last.bias, 1.0)
    hu = np.random.default_rng(0).normal(-1000, 24, (3, 40, 48)).clip(AIR_HU).astype(np.int16)
    hu[:, -9:, :9] = AIR_HU
    padding = np.zeros(hu.shape, bool)
    padding[:, -9:, :9] = True
    assert (hu == AIR_HU)[~padding].mean() > 0.1
    for tile in (WHOLE, (2, 8, 8)):
        answer = denoise_volume(model, hu, tile=tile)
        assert (answer[padding] == AIR_HU).all()
        assert (answer[~padding] > hu[~padding]).mean() > 0.995


@given(strength=st.floats(0.01, 1), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=25, derandomize=True)
def test_strength_is_the_share_of_the_change_that_is_made(strength, seed):
    model, hu = MODELS["redcnn3d", False], noise((3, 20, 24), seed)
    hu[:, :5] = AIR_HU
    change = stitched(model, hu, WHOLE).numpy() - hu
    done = denoise_volume(model, hu, strength=strength)
    assert (done[:, :5] == AIR_HU).all()
    wanted = (hu + strength * change).clip(AIR_HU, 32767)
    assert np.abs(done - wanted)[:, 5:].max() <= 0.51
    assert np.array_equal(denoise_volume(model, hu, strength=1.0), denoise_volume(model, hu))


@pytest.mark.parametrize("strength", [0, -0.5, 1.01, float("nan")])
def test_a_strength_that_is_no_share_is_refused(strength):
    with pytest.raises(UserError, match="above 0 and up to 1"):
        denoise_volume(MODELS["unet3d", False], noise((2, 16, 16)), strength=strength)


def test_answers_beyond_int16_are_clipped():
    model = build(ModelConfig(name="redcnn3d", size="xs"))
    hu = noise((2, 8, 8))
    for bias, expected in ((1e6, 32767), (-1e6, AIR_HU)):
        torch.nn.init.constant_(model.network.last.bias, bias)
        assert (denoise_volume(model, hu) == expected).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_an_answer_that_is_not_finite_is_refused(value):
    model = build(ModelConfig(size="xs"))
    torch.nn.init.constant_(model.network.last.bias, value)
    with pytest.raises(UserError, match="unet3d-xs gives values that are not finite"):
        denoise_volume(model, noise((2, 8, 8)))


def test_bf16_stays_near_fp32():
    model = random_network("unet3d", gain=0.5)
    hu = noise((4, 32, 32))
    change = stitched(model, hu, WHOLE).numpy() - hu
    wrong = denoise_volume(model, hu, bf16=True).astype(float) - hu - change
    assert np.sqrt((wrong**2).mean()) < 0.05 * np.sqrt((change**2).mean()) + 0.5


def test_progress_hears_of_every_tile():
    heard = []
    denoise_volume(
        build(ModelConfig(size="xs")),
        np.zeros((8, 64, 64), np.int16),
        tile=(8, 32, 32),
        progress=lambda *counts: heard.append(counts),
    )
    assert heard == [(i, 4) for i in range(1, 5)]


@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_is_left_as_it_was(training):
    model = build(ModelConfig(size="xs")).train(training)
    denoise_volume(model, np.zeros((2, 8, 8), np.int16))
    assert model.training is training


def test_the_largest_tiles_that_memory_allows_are_taken(monkeypatch):
    model = random_network("redcnn3d")
    hu = noise((6, 24, 120))
    expected = denoise_volume(model, hu)
    given, forward = [], model.forward

    def small_memory(x: torch.Tensor) -> torch.Tensor:
        given.append(x.numel())
        if x.numel() > 6 * 24 * 60:
            raise torch.OutOfMemoryError("no room")
        return forward(x)

    monkeypatch.setattr(model, "forward", small_memory)
    monkeypatch.setitem(TILES, "cpu", ((6, 24, 120), (6, 24, 60), (6, 24, 10)))
    assert np.array_equal(denoise_volume(model, hu), expected)
    sees = model.radius[2]
    assert given[:3] == [6 * 24 * 120, 6 * 24 * (60 + sees), 6 * 24 * (10 + 2 * sees)]
    monkeypatch.setitem(TILES, "cpu", ((6, 24, 120),))
    with pytest.raises(UserError, match="redcnn3d-xs does not fit the memory of cpu"):
        denoise_volume(model, hu)


def test_cudnn_without_room_is_memory_running_out_and_other_errors_are_not(monkeypatch):
    model = random_network("redcnn3d")
    hu = noise((6, 24, 60))
    expected = denoise_volume(model, hu)
    words, forward = "GET was unable to find an engine to execute this computation", model.forward

    def no_room(x: torch.Tensor) -> torch.Tensor:
        if x.numel() == hu.size:
            raise RuntimeError(words)
        return forward(x)

    monkeypatch.setattr(model, "forward", no_room)
    monkeypatch.setitem(TILES, "cpu", ((6, 24, 60), (6, 24, 10)))
    assert np.array_equal(denoise_volume(model, hu), expected)
    words = "CUDA error: an illegal memory access was encountered"
    with pytest.raises(RuntimeError, match="illegal memory"):
        denoise_volume(model, hu)


@pytest.mark.parametrize("bound", ["32 bits", "memory"])
def test_a_gpu_is_given_no_tile_whose_tensors_outgrow_32_bits_or_its_memory(bound):
    on_gpu(_tiles_within, bound)


def _tiles_within(bound):
    model, hu, given = MODELS["unet3d", True], noise((6, 24, 120)), []
    model.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0].numel()))
    widest = model.widest * 6 * 24 * 120
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TILES, "cuda", ((6, 24, 120), (6, 24, 64), (6, 24, 8)))
        if bound == "memory":
            patch.setattr(tiles_module, "_room", lambda device: 2 * 4 * widest - 1)
        else:
            patch.setattr(tiles_module, "FEW_ENOUGH", widest)
        denoise_volume(model, hu, device=torch.device("cuda", 0))
    assert max(given) == 6 * 24 * (64 + 48)


def test_a_gpu_answers_as_a_cpu_does():
    on_gpu(_same_answers)


def _same_answers():
    gpu, hu = torch.device("cuda", 0), noise((7, 50, 70))
    for model in (MODELS["unet3d", True], MODELS["nafnet3d", False]):
        expected = denoise_volume(model, hu, tile=(4, 24, 24))
        answer = denoise_volume(model, hu, tile=(4, 24, 24), device=gpu)
        assert next(model.parameters()).device == gpu
        # a GPU's own rounding: TF32 has ten bits
        assert np.abs(answer - expected).max() <= 0.01 * np.abs(expected - hu).max()
        half = denoise_volume(model, hu, tile=(4, 24, 24), bf16=True)
        assert np.abs(half - expected).max() < 0.1 * np.abs(expected - hu).max()
