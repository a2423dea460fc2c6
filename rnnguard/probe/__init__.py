"""The measuring instrument; leaves no trace on what it measures."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rnnguard.probe.demand import memory_demand as memory_demand
    from rnnguard.probe.functions import lyapunov_exponents as lyapunov_exponents
    from rnnguard.probe.functions import retention as retention
    from rnnguard.probe.input_recall import forward_memory as forward_memory

# torch takes seconds to import, so every public name is looked up when first used.
_PUBLIC = {
    "lyapunov_exponents": "rnnguard.probe.functions",
    "retention": "rnnguard.probe.functions",
    "memory_demand": "rnnguard.probe.demand",
    "forward_memory": "rnnguard.probe.input_recall",
}

__all__ = ["lyapunov_exponents", "retention", "memory_demand", "forward_memory"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'rnnguard.probe' has no attribute {name!r}")
    found = getattr(import_module(_PUBLIC[name]), name)
    # Importing a module of the same name has set it here; the function is what is public.
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
