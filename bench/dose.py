"""How long does simulating low dose take a slice, once the noise is matched?

A generated abdomen, at the matrix sizes of the demo and of clinical series; one dose, and three doses that share one
projection. The last line printed is JSON:

s_per_slice_512         seconds a 512 x 512 slice; must be at most 1.5 on two cores
three_doses_over_one_512  time for three doses at once, over that for one; three runs would take 3
"""

from __future__ import annotations

import json
import time

import torch

from ldct_dist.ct.dose import DoseConfig, matched, simulate_full_dose, simulate_low_dose, simulate_low_doses
from ldct_dist.ct.phantom import body

SLICES = 16


def main() -> None:
    figures: dict[str, float | int] = {"threads": torch.get_num_threads()}
    for matrix in (256, 512):
        clean = body((SLICES, matrix, matrix), (5.0, 400 / matrix, 400 / matrix), seed=0)
        scan = simulate_full_dose(
            clean.hu, clean.spacing, seed=0, config=DoseConfig(photons=4e5, cutoff_per_mm=0.5)
        )
        start = time.perf_counter()
        config = matched(scan, DoseConfig())
        between = time.perf_counter()
        simulate_low_dose(scan, 0.25, seed=1, config=config)
        end = time.perf_counter()
        simulate_low_doses(scan, [0.5, 0.25, 0.1], seed=1, config=config)
        three = time.perf_counter()
        figures[f"three_doses_over_one_{matrix}"] = round((three - end) / (end - between), 2)
        figures[f"match_s_{matrix}"] = round(between - start, 2)
        figures[f"s_per_slice_{matrix}"] = round((end - between) / SLICES, 3)
        print(
            f"{matrix} x {matrix}: match {between - start:.2f} s, then {(end - between) / SLICES:.3f} s a slice"
        )
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
