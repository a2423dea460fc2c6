"""torch.fx of a rewritten model: what rnnguard put there is one call, as torch's own modules."""

from __future__ import annotations

from torch import fx, nn


class Tracer(fx.Tracer):
    """torch.fx's tracer, for which the modules of rnnguard.nn are leaves.

    `fx.GraphModule(model, rnnguard.nn.Tracer().trace(model))` takes the place of
    `fx.symbolic_trace(model)`, which would enter their forward and fail.
    """

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own = type(m).__module__.startswith("rnnguard.nn.")
        return own or super().is_leaf_module(m, module_qualified_name)
