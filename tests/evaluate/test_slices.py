import numpy as np
import pytest
import torch

from ldct_dist.evaluate.metrics import MEASURES, evaluate_volume
from ldct_dist.evaluate.slices import over_slices


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_results_come_in_the_order_of_the_slices(threads):
    threads(3)
    volume = np.arange(40).reshape(20, 2)
    assert over_slices(lambda a, b: int(a[0] + b), volume, range(20)) == [3 * i for i in range(20)]


@pytest.mark.parametrize("protocol", ["abdomen", "abdomen-3d"])
def test_figures_are_the_same_to_the_last_bit_with_any_number_of_threads(threads, protocol):
    rng = np.random.default_rng(0)
    full = rng.integers(-100, 200, (24, 64, 64), dtype=np.int16)
    image = full + rng.integers(-20, 20, full.shape, dtype=np.int16)
    figures = []
    for number in (1, 3):
        threads(number)
        figures.append(evaluate_volume(image, full, protocol, measures=MEASURES))
    assert figures[0] == figures[1]
