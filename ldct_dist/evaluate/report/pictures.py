"""Three planes of every image of a case, as PNG data addresses that a page can hold."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import Colormap, Normalize
from PIL import Image

from ldct_dist.evaluate.figures import GREY, SIGNED, body_box, minus, plane_sizes_mm, planes, round_up
from ldct_dist.evaluate.physics.maps import hallucination_map, noise_map
from ldct_dist.evaluate.physics.reference import Reference
from ldct_dist.evaluate.protocols import Protocol, protocol_named

_HEAT = colormaps["magma"]
_STRUCTURE_LIMIT = 8.0  # standard deviations


def pictures_of(protocol: Protocol, reference: Reference, images: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Every image of a case, full dose included, in each view: {"sizes": mm (height, width) of each plane, "views": view ->
    image -> three addresses}."""
    full, moments = reference.full, reference.moments
    box = body_box(full.hu)
    views = {}
    for window in {p.window: p for p in map(protocol_named, ("ldctbench-abdomen", "ldctbench-chest"))} | {
        protocol.window: protocol
    }:
        label = minus(f"window [{window[0]:g}, {window[1]:g}] HU")
        views[label] = {
            name: _planes_as_png(hu, box, GREY, Normalize(*window)) for name, hu in images.items()
        }

    errors = {name: hu.astype(np.float32) - full.hu for name, hu in images.items()}
    limit = round_up(max(float(np.percentile(np.abs(e[box]), 99.5)) for e in errors.values()))
    label = f"difference from full dose, ±{limit:g} HU"
    views[label] = {n: _planes_as_png(e, box, SIGNED, Normalize(-limit, limit)) for n, e in errors.items()}

    noises = {name: noise_map(hu, full.spacing) for name, hu in images.items()}
    # Twice the noise of soft tissue: edges vary more, and a scale that held them would show nothing else.
    within = np.s_[:] if moments.homogeneous is None else moments.homogeneous
    limit = round_up(2 * max(float(np.median(n[within])) for n in noises.values()))
    label = f"local standard deviation, of noise and of edges, 0 to {limit:g} HU"
    views[label] = {name: _planes_as_png(hu, box, _HEAT, Normalize(0, limit)) for name, hu in noises.items()}

    if reference.std is not None:
        scale = Normalize(-_STRUCTURE_LIMIT, _STRUCTURE_LIMIT)
        label = f"structure added or lost, ±{_STRUCTURE_LIMIT:g} standard deviations of full dose's noise"
        views[label] = {
            name: _planes_as_png(hallucination_map(hu, full, reference.std), box, SIGNED, scale)
            for name, hu in images.items()
        }
    return {"sizes": plane_sizes_mm(box, full.spacing), "views": views}


def _planes_as_png(
    hu: np.ndarray, box: tuple[slice, slice, slice], colours: Colormap, scale: Normalize
) -> list[str]:
    """Addresses of the axial, coronal and sagittal plane, voxel by voxel: the page stretches them to millimetres."""
    return [_png(plane, colours, scale) for plane in planes(hu, box)]


def _png(plane: np.ndarray, colours: Colormap, scale: Normalize) -> str:
    shown = np.clip((plane - scale.vmin) / (scale.vmax - scale.vmin), 0, 1)  # type: ignore[operator]
    if colours is GREY:
        image = Image.fromarray((shown * 255).round().astype(np.uint8))
    else:
        palette = (colours(np.arange(256) / 255)[:, :3] * 255).round().astype(np.uint8)
        image = Image.fromarray((shown * 255).round().astype(np.uint8), "P")
        image.putpalette(palette.tobytes())
    written = io.BytesIO()
    image.save(written, "png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(written.getvalue()).decode()
