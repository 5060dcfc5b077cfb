"""Named ways to turn a pair of volumes into figures of merit, so that a number says what it means.

The same white noise of 20 HU reads 37.5 dB in a window 1500 HU wide and 26.0 dB in one of 400: a PSNR without its
window says nothing. A protocol fixes all that the figures depend on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ldct_dist.errors import UserError

Range = tuple[float, float]


@dataclass(frozen=True)
class Protocol:
    """What is clipped, compared and averaged.

    window: HU, lowest and highest; both images are clipped to it for PSNR and SSIM, and its width is their data range.
    rmse_range: HU; both images are clipped to it for RMSE and VIF.
    dose: the fraction of full dose at which those who use the protocol compare.
    counts: "all" voxels; or "scanned", those whose full dose is not padding. Padding is the same in both images, so
        counting it flatters every figure; what is published counts it.
    ssim: the local window, of 7 x 7 equal weights or an 11 x 11 Gaussian of sigma 1.5; in 3-D as deep as wide.
    ssim_border: where that window does not fit into the slice, SSIM's map is left out; or "zeros" of intensity go on
        beyond the slice, and all of the map is averaged.
    ssim_zero: the HU that are zero intensity to SSIM, which compares brightness too; None: the window's lowest.
    vif_source: the image whose information is the whole: "full", the full dose, as VIF is defined; or "image".
    average: "slice", the mean of the slices' figures; or "volume", one figure of all voxels.
    dims: 2, local windows lie in the slice; or 3, they span slices.
    """

    name: str
    window: Range
    rmse_range: Range
    dose: float = 0.25
    counts: Literal["all", "scanned"] = "all"
    ssim: Literal["uniform7", "gaussian11"] = "uniform7"
    ssim_border: Literal["left out", "zeros"] = "left out"
    ssim_zero: float | None = None
    vif_source: Literal["full", "image"] = "full"
    average: Literal["slice", "volume"] = "slice"
    dims: Literal[2, 3] = 2

    @property
    def data_range(self) -> float:
        return self.window[1] - self.window[0]

    def in_3d(self) -> Protocol:
        """The same windows on whole volumes: local windows span slices, and all voxels are averaged at once."""
        return replace(self, name=f"{self.name}-3d", average="volume", dims=3)

    def __str__(self) -> str:
        """Such as "abdomen, window [-150, 249] HU (RMSE, VIF: [-1024, 1900]), padding left out"; the words that stand
        beside every figure."""
        padding = "counted" if self.counts == "all" else "left out"
        (low, high), (least, most) = self.window, self.rmse_range
        wider = f" (RMSE, VIF: [{least:g}, {most:g}])" if self.rmse_range != self.window else ""
        return f"{self.name}, window [{low:g}, {high:g}] HU{wider}, padding {padding}"


def _dicom_window(centre: float, width: float) -> Range:
    """A window of `width` whole HU, as DICOM counts them (PS3.3 C.11.2.1.2): its highest is centre + width / 2 - 1."""
    return centre - width / 2, centre + width / 2 - 1


_CHEST, _ABDOMEN, _NEURO = _dicom_window(-600, 1500), _dicom_window(50, 400), _dicom_window(40, 80)
_RMSE = (-1024.0, 1900.0)

_IN_2D = (
    # The windows of ldct-benchmark on what was scanned, and VIF as it is defined: without padding, and VIF apart, the
    # figures are ldct-benchmark's. The doses are those of its data, LDCT-and-Projection-data.
    Protocol("chest", _CHEST, _RMSE, dose=0.10, counts="scanned"),
    Protocol("abdomen", _ABDOMEN, _RMSE, counts="scanned"),
    Protocol("neuro", _NEURO, _RMSE, counts="scanned"),
    # As its compute_metric has them, to compare with what is published: it counts padding, and hands VIF its two images
    # the other way round.
    Protocol("ldctbench-chest", _CHEST, _RMSE, dose=0.10, vif_source="image"),
    Protocol("ldctbench-abdomen", _ABDOMEN, _RMSE, vif_source="image"),
    Protocol("ldctbench-neuro", _NEURO, _RMSE, vif_source="image"),
    # As the widely used RED-CNN implementation scores patient L506 of Mayo 2016: its RMSE is windowed too,
    # and its SSIM takes the HU as they are and goes on beyond the slice.
    Protocol(
        "redcnn-l506", (-160.0, 240.0), (-160.0, 240.0), ssim="gaussian11", ssim_border="zeros", ssim_zero=0.0
    ),
    # All that 12 bits hold.
    Protocol("full-range", (-1024.0, 3071.0), (-1024.0, 3071.0), counts="scanned", average="volume"),
)
PROTOCOLS = {protocol.name: protocol for named in _IN_2D for protocol in (named, named.in_3d())}
"""By name; each also as NAME-3d."""


def protocol_named(name: str) -> Protocol:
    """Raises UserError that lists the names there are."""
    if name not in PROTOCOLS:
        names = ", ".join(protocol.name for protocol in _IN_2D)
        raise UserError(
            f"protocol {name!r}: there is no such protocol; choose from {names}, or one of them with -3d"
        )
    return PROTOCOLS[name]
