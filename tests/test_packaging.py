"""The wheel, the wheel made from the sdist and the checkout all read the same rules."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock

READ_RULE = """
import rnnguard
from rnnguard.decision.rulebook import load_rulebook

print(rnnguard.__file__)
print(load_rulebook().rule("RG401").model_dump_json())
"""


@dataclass(frozen=True)
class Built:
    """The archives, each built once for the whole run."""

    wheel: Path
    sdist: Path
    wheel_from_sdist: Path


def _build(root: Path, out: Path, *what: str) -> None:
    command = [sys.executable, "-m", "build", "--no-isolation", *what, "--outdir", str(out)]
    done = subprocess.run([*command, str(root)], capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


@pytest.fixture(scope="session")
def built(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    base = tmp_path_factory.getbasetemp()
    # The workers of one run share the folder above their own.
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "built"
    direct, indirect = shared / "direct", shared / "indirect"
    with FileLock(shared.with_suffix(".lock")):
        if not (shared / "done").exists():
            _build(root, direct, "--wheel")
            # Without a choice `build` makes the sdist, unpacks it, and makes the wheel from that.
            _build(root, indirect)
            (shared / "done").touch()
    (wheel,), (sdist,) = direct.glob("*.whl"), indirect.glob("*.tar.gz")
    (wheel_from_sdist,) = indirect.glob("*.whl")
    return Built(wheel, sdist, wheel_from_sdist)


@pytest.fixture(params=["wheel", "wheel_from_sdist"])
def wheel(request: pytest.FixtureRequest, built: Built) -> Path:
    path: Path = getattr(built, request.param)
    return path


def test_wheel_holds_the_package_and_the_rules(wheel: Path, root: Path) -> None:
    files = [file for file in (root / "rnnguard").rglob("*") if file.is_file()]
    wanted = {file.relative_to(root).as_posix() for file in files if file.suffix != ".pyc"}
    rules = {"rnnguard/rules/rules.toml", "rnnguard/rules/scenarios.toml"}
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert "rnnguard/py.typed" in wanted
    assert wanted | rules <= names
    strangers = {name.split("/")[0] for name in names} - {"rnnguard", "rnnguard-0.1.0.dist-info"}
    assert strangers == set()


def test_wheel_reads_a_rule(
    wheel: Path, tmp_path: Path, root: Path, fresh_python: Callable[..., str]
) -> None:
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked)
    place, rule = fresh_python("-c", READ_RULE, path=unpacked).splitlines()
    place_here, rule_here = fresh_python("-c", READ_RULE, path=root).splitlines()
    assert Path(place).is_relative_to(unpacked)
    assert Path(place_here).is_relative_to(root)
    assert '"code":"RG401"' in rule
    assert rule == rule_here
