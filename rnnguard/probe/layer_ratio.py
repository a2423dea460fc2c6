"""How unlike the gradients of a site's stacked layers are."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping

from rnnguard.inspection.gates import parameter_name, recurrences
from rnnguard.inspection.sites import FoundSite


def layer_ratio(found: FoundSite, norms: Mapping[str, float]) -> float | None:
    """Largest over smallest norm of the gradients of the recurrent weights, layer by layer.

    norms: of each parameter's gradient, by its name in the model. None where fewer than two layers
    have a gradient, as of those above a lower layer that is read out. Recurrent weights, since
    only these are of one size.
    """
    by_layer: dict[int, list[float]] = {}
    for layer, direction in recurrences(found.module):
        name = parameter_name(found.module, "weight_hh", layer, direction)
        path = f"{found.record.path}.{name}".removeprefix(".")
        by_layer.setdefault(layer, []).append(norms.get(path, 0.0))
    layers = [norm for parts in by_layer.values() if (norm := math.hypot(*parts)) > 0]
    if len(layers) < 2 or not all(map(math.isfinite, layers)):
        return None
    return min(max(layers) / min(layers), sys.float_info.max)
