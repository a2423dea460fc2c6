"""What all tests share: fixed seeds, one torch thread, the parsed package, a fresh interpreter."""

from __future__ import annotations

import ast
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Source:
    """One module of the package; `path` is relative to rnnguard/, with forward slashes."""

    path: str
    text: str
    tree: ast.Module


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    # Only what is imported already: a test that proves torch-free imports must stay cheap.
    random.seed(0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)
        torch.set_num_threads(1)


@pytest.fixture
def nan_memory() -> Iterator[None]:
    """Fills what torch.empty gives with NaN, so that a value nobody wrote shows itself."""
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def sources() -> tuple[Source, ...]:
    """Every module of the package, parsed."""
    package = ROOT / "rnnguard"
    texts = {file: file.read_text(encoding="utf-8") for file in sorted(package.rglob("*.py"))}
    return tuple(
        Source(file.relative_to(package).as_posix(), text, ast.parse(text, str(file)))
        for file, text in texts.items()
    )


@pytest.fixture
def fresh_python(tmp_path: Path) -> Callable[..., str]:
    """Runs a new interpreter outside the checkout and gives its stdout; fails when it fails.

    `path` is where it imports rnnguard from, the checkout by default.
    """

    def run(*arguments: str, path: Path = ROOT) -> str:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
        environment["PYTHONPATH"] = str(path)
        command = [sys.executable, *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout

    return run
