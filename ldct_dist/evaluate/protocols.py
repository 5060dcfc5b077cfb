"""Named ways to turn a pair of volumes into figures of merit, so that a number says what it means.

The same white noise of 20 HU reads 37.5 dB in a window 1500 HU wide and 26.0 dB in one of 400: a PSNR without its
window says nothing. A protocol fixes all that the figures depend on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ldct_dist.errors import UserError

Range = tuple[float, float]


@dataclass(frozen=True)
class Protocol:
    """What is clipped, compared and averaged.

    window: HU, lowest and highest; both images are clipped to it for PSNR and SSIM, and its width is their data range.
    rmse_range: HU; both images are clipped to it for the RMSE.
    ssim: the local window, of 7 x 7 equal weights or an 11 x 11 Gaussian of sigma 1.5.
    ssim_zero: the HU that are zero intensity to SSIM, which compares brightness too; None: the window's lowest.
    average: "slice", the mean of the slices' figures; or "volume", one mean square over all voxels.
    """

    name: str
    window: Range
    rmse_range: Range
    ssim: Literal["uniform7", "gaussian11"] = "uniform7"
    ssim_zero: float | None = None
    average: Literal["slice", "volume"] = "slice"

    @property
    def data_range(self) -> float:
        return self.window[1] - self.window[0]

    def __str__(self) -> str:
        """Such as "ldctbench-abdomen, window [-150, 250] HU"; the words that stand beside every figure."""
        return f"{self.name}, window [{self.window[0]:g}, {self.window[1]:g}] HU"


def _centre_width(centre: float, width: float) -> Range:
    return centre - width / 2, centre + width / 2


_LDCTBENCH_RMSE = (-1024.0, 1900.0)

PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        # As ldct-benchmark's compute_metric has them.
        Protocol("ldctbench-chest", _centre_width(-600, 1500), _LDCTBENCH_RMSE),
        Protocol("ldctbench-abdomen", _centre_width(50, 400), _LDCTBENCH_RMSE),
        Protocol("ldctbench-neuro", _centre_width(40, 80), _LDCTBENCH_RMSE),
        # As the widely used RED-CNN implementation scores patient L506 of Mayo 2016: its RMSE is windowed too,
        # and its SSIM takes the HU as they are.
        Protocol("redcnn-l506", (-160.0, 240.0), (-160.0, 240.0), ssim="gaussian11", ssim_zero=0.0),
        # All that 12 bits hold.
        Protocol("full-range", (-1024.0, 3071.0), (-1024.0, 3071.0), average="volume"),
    )
}


def protocol_named(name: str) -> Protocol:
    """Raises UserError that lists the names there are."""
    if name not in PROTOCOLS:
        raise UserError(f"protocol {name!r}: there is no such protocol; choose from {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
