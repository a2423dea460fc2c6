"""How unlike the gradients of a site's stacked layers are."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping

from rnnguard.inspection.gates import parameter_name, recurrences
from rnnguard.inspection.sites import FoundSite


def layer_ratio(found: FoundSite, norms: Mapping[str, float]) -> float | None:
    """Largest over smallest norm of the gradients of the recurrent weights, layer by layer.

    norms: of each parameter's gradient, by its name in the model. Layers on top without any
    gradient are left out, as those above a lower layer that is read out; one below others has lost
    it on the way. None where fewer than two layers are left. Recurrent weights, since only these
    are of one size; those that go by another name, as a parametrized one, are not known.
    """
    by_layer: dict[int, list[float]] = {}
    for layer, direction in recurrences(found.module):
        name = parameter_name(found.module, "weight_hh", layer, direction)
        path = f"{found.record.path}.{name}".removeprefix(".")
        if path in norms:
            by_layer.setdefault(layer, []).append(norms[path])
    layers = [math.hypot(*parts) for _, parts in sorted(by_layer.items())]
    while layers and layers[-1] == 0:
        layers.pop()
    if len(layers) < 2 or not all(map(math.isfinite, layers)):
        return None
    return min(max(layers) / max(min(layers), sys.float_info.min), sys.float_info.max)
