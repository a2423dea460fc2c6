"""Finds out whether a recurrent PyTorch model can learn what its data asks of it, and mends it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rnnguard import nn as nn
    from rnnguard import probe as probe
    from rnnguard.baking import Baked as Baked
    from rnnguard.baking import bake as bake
    from rnnguard.errors import RefusedError as RefusedError
    from rnnguard.errors import RewriteError as RewriteError
    from rnnguard.errors import RNNGuardError as RNNGuardError
    from rnnguard.errors import RNNGuardWarning as RNNGuardWarning
    from rnnguard.errors import RulesError as RulesError
    from rnnguard.errors import UndoError as UndoError
    from rnnguard.pipeline import apply as apply
    from rnnguard.pipeline import audit as audit
    from rnnguard.pipeline import plan as plan
    from rnnguard.pipeline import stabilize as stabilize
    from rnnguard.records import Plan as Plan
    from rnnguard.report.report import Report as Report

__version__ = "0.1.0"

# torch takes seconds to import, so every public name is looked up when first used.
_PUBLIC = {
    "stabilize": "rnnguard.pipeline",
    "audit": "rnnguard.pipeline",
    "plan": "rnnguard.pipeline",
    "apply": "rnnguard.pipeline",
    "bake": "rnnguard.baking",
    "Baked": "rnnguard.baking",
    "Plan": "rnnguard.records",
    "Report": "rnnguard.report.report",
    "RNNGuardError": "rnnguard.errors",
    "RNNGuardWarning": "rnnguard.errors",
    "RefusedError": "rnnguard.errors",
    "RewriteError": "rnnguard.errors",
    "RulesError": "rnnguard.errors",
    "UndoError": "rnnguard.errors",
}
_FOLDERS = ("nn", "probe")


def __getattr__(name: str) -> Any:
    if name in _FOLDERS:
        return import_module(f"rnnguard.{name}")
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'rnnguard' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*_PUBLIC, *_FOLDERS, "__version__"])
