"""Named ways to measure image quality: a PSNR without its window and data range means nothing.

The same white error of 20 HU reads 38, 26 or 18 dB by window alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from ldct_dist.errors import UserError


@dataclass(frozen=True)
class Protocol:
    """window: HU (low, high) that images are clipped to before PSNR and SSIM; their data range is its width.

    RMSE is in HU, not windowed. All figures are taken slice by slice and averaged over the slices, as the
    papers do; only slices' voxels inside the field of view count (see `metrics`).
    """

    name: str
    window: tuple[float, float]
    source: str

    @property
    def data_range(self) -> float:
        return self.window[1] - self.window[0]


def _centred(centre: float, width: float) -> tuple[float, float]:
    return centre - width / 2, centre + width / 2


PROTOCOLS = {
    p.name: p
    for p in (
        Protocol("ldctbench-chest", _centred(-600, 1500), "ldct-benchmark, chest: centre -600, width 1500"),
        Protocol("ldctbench-abdomen", _centred(50, 400), "ldct-benchmark, abdomen: centre 50, width 400"),
        Protocol("ldctbench-neuro", _centred(40, 80), "ldct-benchmark, neuro: centre 40, width 80"),
        Protocol("redcnn-l506", (-160.0, 240.0), "RED-CNN and its successors on Mayo 2016, patient L506"),
        Protocol("full-range", (-1024.0, 3071.0), "the 12 bits of clinical CT"),
    )
}


def protocol(name: str) -> Protocol:
    """The protocol of that name. Raises UserError naming those there are."""
    if name not in PROTOCOLS:
        raise UserError(f"protocol {name!r}: there are {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
