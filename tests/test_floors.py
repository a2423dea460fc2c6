"""Imports go strictly down the floors, and what must not import torch does not."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from conftest import Source

# A unit is a folder or a top-level module of the package.
FLOORS = {
    "errors": 0,
    "files": 0,
    "records": 0,
    "usage": 0,
    "measurements": 0,
    "race": 0,
    "inspection": 1,
    "probe": 2,
    "decision": 3,
    "nn": 4,
    "rewrite": 4,
    "remedies": 4,
    "report": 5,
    "replay": 5,
    "mending": 5,
    "racing": 5,
    "trying": 5,
    "ranks": 5,
    "request": 5,
    "baking": 5,
    "settings_file": 5,
    "findings": 5,
    "pipeline": 6,
    "__init__": 7,
    "__main__": 7,
    "cli": 7,
    "targets": 7,
    "arguments": 7,
    "options": 7,
    "answers": 7,
    "pytest_plugin": 7,
    "demo": 7,
    "bench": 7,
    "integrations": 7,
}
# What may be imported on one's own floor; the doors all open onto the public names.
SIDEWAYS = {
    "records": {"errors", "files"},
    "usage": {"records"},
    "measurements": {"records", "usage"},
    "rewrite": {"nn"},
    "remedies": {"nn", "rewrite"},
    "race": {"records"},
    "mending": {"replay"},
    "racing": {"replay"},
    "trying": {"mending", "racing", "replay", "report", "request"},
    "request": {"mending", "ranks", "report"},
    "findings": {"replay", "report"},
    "__main__": {"__init__", "cli"},
    "cli": {"__init__", "answers", "arguments", "bench", "demo", "options", "targets"},
    "answers": {"targets"},
    "arguments": {"targets"},
    "targets": {"__init__"},
    "pytest_plugin": {"__init__"},
    "demo": {"__init__"},
    "bench": {"__init__", "answers", "demo", "options"},
    "integrations": {"__init__"},
}
TORCH_FREE = {
    "errors", "files", "records", "usage", "measurements", "race", "decision", "settings_file"
}  # fmt: skip
HEAVY = ("torch", "sklearn", "scipy", "numpy", "matplotlib", "rich", "jinja2", "typer")


def unit_of(path: str) -> str:
    return path.split("/")[0].removesuffix(".py")


def _absolute(node: ast.ImportFrom, path: str) -> str:
    if not node.level:
        return node.module or ""
    folders = ["rnnguard", *path.split("/")[:-1]]
    above = folders[: len(folders) - node.level + 1]
    return ".".join(above + ([node.module] if node.module else []))


def imported_names(path: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything imported, wherever in the module it happens."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (
                (node.lineno, alias.name) for alias in node.names if alias.name != "rnnguard"
            )
        elif isinstance(node, ast.ImportFrom):
            module = _absolute(node, path)
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute):
            # `import rnnguard` counts by what is taken from it.
            if isinstance(node.value, ast.Name) and node.value.id == "rnnguard":
                yield node.lineno, f"rnnguard.{node.attr}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            name = node.args[0] if node.args else None
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield node.lineno, name.value


def imported_units(path: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    for line, name in imported_names(path, tree):
        first, _, rest = name.partition(".")
        own = rest.split(".")[0]
        # `rnnguard.__file__` and `rnnguard.__version__` are facts of the package, not doors.
        if first == "rnnguard" and not (own.startswith("__") and own not in FLOORS):
            yield line, own if own in FLOORS else "__init__"


def climbs(path: str, tree: ast.Module) -> list[str]:
    """The imports of a module that do not go down."""
    unit = unit_of(path)
    return [
        f"rnnguard/{path}:{line}: {unit} (floor {FLOORS[unit]}) imports "
        f"{other} (floor {FLOORS[other]})"
        for line, other in imported_units(path, tree)
        if other != unit
        and FLOORS[other] >= FLOORS[unit]
        and other not in SIDEWAYS.get(unit, set())
    ]


def imports_torch(path: str, tree: ast.Module) -> list[str]:
    return [
        f"rnnguard/{path}:{line}: imports {name}"
        for line, name in imported_names(path, tree)
        if name.split(".")[0] == "torch"
    ]


def test_every_unit_has_a_floor(sources: tuple[Source, ...]) -> None:
    unknown = {unit_of(source.path) for source in sources} - set(FLOORS)
    assert not unknown, f"give {unknown} a floor in the design and in this table"


def test_imports_go_strictly_down(sources: tuple[Source, ...]) -> None:
    assert [line for source in sources for line in climbs(source.path, source.tree)] == []


def test_words_and_head_never_import_torch(sources: tuple[Source, ...]) -> None:
    free = [source for source in sources if unit_of(source.path) in TORCH_FREE]
    assert len(free) >= len(TORCH_FREE)
    assert [line for source in free for line in imports_torch(source.path, source.tree)] == []


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("errors.py", "from rnnguard.records import Plan"),
        ("probe/trial.py", "from ..decision import planning"),
        ("probe/trial.py", "def f():\n    import rnnguard.report.text"),
        ("probe/trial.py", "if TYPE_CHECKING:\n    from rnnguard import pipeline"),
        ("probe/trial.py", "importlib.import_module('rnnguard.decision')"),
        ("decision/planning.py", "import rnnguard\nrnnguard.stabilize"),
        ("nn/lstm.py", "from rnnguard.rewrite.edit import Edit"),
        ("rewrite/edit.py", "from rnnguard.remedies import REMEDIES"),
        ("demo.py", "from .cli import main"),
    ],
)
def test_a_climb_is_seen(path: str, code: str) -> None:
    assert len(climbs(path, ast.parse(code))) == 1


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("decision/planning.py", "import rnnguard\nrnnguard.__file__"),
        ("decision/planning.py", "from . import rulebook\nfrom .rulebook import Rule"),
        ("decision/planning.py", "from ..records import Plan\nfrom ..errors import RulesError"),
        ("remedies/clip_gradient.py", "from rnnguard.nn import IndRNN\nfrom ..rewrite import edit"),
        ("cli.py", "from rnnguard import __version__, audit, demo"),
        ("report/sarif.py", "from rnnguard import __version__"),
        ("probe/trial.py", "import torch, rnnguardian\nfrom torch import nn"),
    ],
)
def test_a_way_down_is_free(path: str, code: str) -> None:
    assert climbs(path, ast.parse(code)) == []


@pytest.mark.parametrize("code", ["import torch", "def f():\n    from torch.nn import RNN"])
def test_torch_is_seen(code: str) -> None:
    assert len(imports_torch("records.py", ast.parse(code))) == 1


@pytest.mark.parametrize("module", ["rnnguard", "rnnguard.pytest_plugin"])
def test_import_is_light(fresh_python: Callable[..., str], module: str) -> None:
    code = f"import sys, {module}; print([m for m in {HEAVY} if m in sys.modules])"
    assert fresh_python("-c", code).strip() == "[]"


def test_head_runs_without_torch(
    fresh_python: Callable[..., str], sources: tuple[Source, ...]
) -> None:
    paths = [source.path for source in sources if unit_of(source.path) in TORCH_FREE]
    modules = [
        "rnnguard." + path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for path in paths
    ]
    code = f"import sys, {', '.join(modules)}; print('torch' in sys.modules)"
    assert fresh_python("-c", code).strip() == "False"


def test_a_pytest_run_with_the_plugin_never_imports_torch(
    fresh_python: Callable[..., str], tmp_path: Path
) -> None:
    trivial = """
        import sys

        def test_trivial():
            assert "rnnguard.pytest_plugin" in sys.modules

        def test_last():
            assert "torch" not in sys.modules
    """
    (tmp_path / "test_trivial.py").write_text(textwrap.dedent(trivial))
    # Uninstalled, the plugin has to be named; installed, naming it would load it twice.
    installed = entry_points(group="pytest11", name="rnnguard")
    named = [] if installed else ["-p", "rnnguard.pytest_plugin"]
    options = ["-q", "-p", "no:cacheprovider", *named]
    assert "2 passed" in fresh_python("-m", "pytest", *options, "test_trivial.py")
