"""The catalogue's examples, run: what the audit finds in each rule's example and healthy twin."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

import rnnguard
from rnnguard.decision.rulebook import Rule
from rnnguard.report.report import Report
from rnnguard.targets import AUDIT_ARGUMENTS

Kind = Literal["example", "twin"]
PRELUDE = "import torch\nfrom torch import nn\n\n"


def audited(rule: Rule, kind: Kind, folder: Path, seed: int = 0) -> Report:
    """The audit of a rule's example or twin, written to a file in `folder` and run from there."""
    code = PRELUDE + getattr(rule, kind).strip() + "\n"
    file = folder / f"{rule.name.replace('-', '_')}_{kind}.py"
    file.write_text(code, encoding="utf-8")
    with _imported(file, seed) as names:
        arguments = {name: names[name] for name in AUDIT_ARGUMENTS if name in names}
        return rnnguard.audit(**arguments, seed=seed, verbose=False)


@contextmanager
def _imported(file: Path, seed: int) -> Iterator[dict[str, Any]]:
    """The names that a file defines, as an import would; forgotten afterwards."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # where inspect looks for the source of its classes
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # What torch itself warns of is part of some examples.
            warnings.simplefilter("ignore")
            torch.manual_seed(seed)
            spec.loader.exec_module(module)
        yield vars(module)
    finally:
        del sys.modules[file.stem]
