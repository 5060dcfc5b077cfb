"""What an image of a patient is measured on besides its figures: the full dose's own tissue and noise."""

from __future__ import annotations

from typing import Any

import numpy as np

from ldct_dist.ct import noise
from ldct_dist.ct.volume import Volume
from ldct_dist.errors import UserError
from ldct_dist.evaluate.physics.maps import CONSPICUOUS, hallucination_map, smoothed_noise
from ldct_dist.evaluate.physics.tissue import tissue_bias, tissues
from ldct_dist.store.layout import BODY_HU


class Ground:
    """What every method on a case is measured on, worked out of its low and full dose once.

    soft: None where there is too little soft tissue to measure noise. std: None where `lacks` says why.
    """

    def __init__(self, low: Volume, full: Volume) -> None:
        self.full = full
        self.moments = noise.local_moments(full.hu, full.spacing)
        self.tissues = tissues(full, self.moments)
        self.soft = self.moments.homogeneous
        self.std: np.ndarray | None = None
        self.lacks: str | None = None
        try:
            self.std = smoothed_noise(low, full, self.moments)
        except UserError as e:
            self.lacks = "too little soft tissue to measure noise" if self.soft is None else str(e)

    def facts(self, image: np.ndarray) -> dict[str, Any]:
        """bias_hu and, as far as they can be told, noise_hu and conspicuous: of a row of the study."""
        found: dict[str, Any] = {"bias_hu": tissue_bias(image, self.full, self.tissues)}
        if self.soft is not None:
            # In the full dose's flat windows: smooth images have others, which would leave out what is left of their
            # noise.
            variance = noise.local_moments(image, self.full.spacing).variance[self.soft & self.moments.flat]
            found["noise_hu"] = float(np.sqrt(np.median(variance)))
        if self.std is not None:
            body = self.moments.mean > BODY_HU
            off = np.abs(hallucination_map(image, self.full, self.std))
            found["conspicuous"] = float((off[body] > CONSPICUOUS).mean())
        return found
