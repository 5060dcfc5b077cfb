"""What is measured on every image of a patient beside the protocol's figures: bias by tissue, noise, structure that is off."""

from __future__ import annotations

from typing import Any

import numpy as np

from ldct_dist.ct import noise
from ldct_dist.ct.volume import Volume
from ldct_dist.errors import UserError
from ldct_dist.evaluate.physics.maps import CONSPICUOUS, hallucination_map, smoothed_noise
from ldct_dist.evaluate.physics.tissue import tissue_bias, tissues
from ldct_dist.evaluate.slices import over_slices
from ldct_dist.store.layout import BODY_HU


class Reference:
    """A case's tissue and noise, found once in its low and full dose, against which every method's image is measured.

    soft: windows of soft tissue, None where there is too little to measure noise. std: of `smoothed_noise`; None where it
    cannot be measured, and `lacks` says why.
    """

    def __init__(self, low: Volume, full: Volume) -> None:
        self.full = full
        self.moments = noise.local_moments(full.hu, full.spacing, share_out=over_slices)
        self.tissues = tissues(full, self.moments)
        self.soft = self.moments.homogeneous
        self.std: np.ndarray | None = None
        self.lacks: str | None = None
        try:
            self.std = smoothed_noise(low, full, self.moments)
        except UserError as e:
            self.lacks = "too little soft tissue to measure noise" if self.soft is None else str(e)

    def facts(self, image: np.ndarray) -> dict[str, Any]:
        """The fields of a study's Row: bias_hu and, if they can be measured, noise_hu and conspicuous."""
        found: dict[str, Any] = {"bias_hu": tissue_bias(image, self.full, self.tissues)}
        if self.soft is not None:
            # In windows that are flat in the full dose: those that are in a smooth image leave out what noise it has.
            moments = noise.local_moments(image, self.full.spacing, share_out=over_slices)
            found["noise_hu"] = float(np.sqrt(np.median(moments.variance[self.soft])))
        if self.std is not None:
            body = self.moments.mean > BODY_HU
            off = np.abs(hallucination_map(image, self.full, self.std))
            found["conspicuous"] = float((off[body] > CONSPICUOUS).mean())
        return found
