"""make says in one sentence what is missing, installs once, and mends a half-made .venv.

Nothing is installed: a shell script stands for Python, for the one in .venv too.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

Done = subprocess.CompletedProcess[str]
Make = Callable[..., Done]


def fake_python(version: str, *, ensurepip: bool = True) -> str:
    """A script that answers like Python and writes down which commands it was given.

    The `rnnguard`, `ruff`, `mypy` and `pytest` of its environments give their own names.
    """
    return textwrap.dedent(f"""\
        #!/bin/sh
        case "$*" in
            --version) echo "Python {version}" ;;
            *ensurepip*) exit {0 if ensurepip else 1} ;;
            *version_info*) exit 0 ;;
            "-m venv "*)
                echo venv >> calls
                mkdir -p .venv/bin && cp "$0" .venv/bin/python
                for tool in rnnguard ruff mypy pytest; do
                    printf '#!/bin/sh\\necho %s "$@"\\n' $tool > .venv/bin/$tool
                    chmod +x .venv/bin/$tool
                done ;;
            "-m pip install "*)
                echo install >> calls
                if [ -e break ]; then exit 1; fi ;;
        esac
        """)


@pytest.fixture
def checkout(tmp_path: Path, root: Path) -> Path:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(root / name, tmp_path)
    return tmp_path


@pytest.fixture
def make(checkout: Path) -> Make:
    """Runs make in the copied checkout with `python` as the only python3."""

    def run(goal: str, python: str | None) -> Done:
        tools = checkout / "tools"
        tools.mkdir(exist_ok=True)
        if python is not None:
            (tools / "python3").write_text(python)
            (tools / "python3").chmod(0o755)
        for name in ("sh", "mkdir", "touch", "rm", "cp", "chmod", "echo"):
            found = shutil.which(name)
            assert found
            (tools / name).unlink(missing_ok=True)
            (tools / name).symlink_to(found)
        # Neither this run's PYTHON nor its make flags may reach the inner make.
        program = shutil.which("make")
        assert program, "make is not installed"
        environment = {"PATH": str(tools), "LC_ALL": "C"}
        return subprocess.run(
            [program, goal], cwd=checkout, env=environment, capture_output=True, text=True
        )

    return run


def calls(checkout: Path) -> list[str]:
    log = checkout / "calls"
    return log.read_text().split() if log.exists() else []


CURE = "install Python 3.11 or newer, or name one as in `make PYTHON=/path/to/python3.11`"


@pytest.mark.parametrize("goal", ["demo", "test"])
@pytest.mark.parametrize(
    ("python", "sentence"),
    [
        (fake_python("3.9.18"), f"`python3` is Python 3.9, too old for rnnguard: {CURE}"),
        (fake_python("2.7.18"), f"`python3` is Python 2.7, too old for rnnguard: {CURE}"),
        (None, f"`python3` was not found or does not start: {CURE}"),
        ("#!/bin/sh\nexit 127\n", f"`python3` was not found or does not start: {CURE}"),
        (
            fake_python("3.12.1", ensurepip=False),
            "`python3` lacks the module venv or ensurepip: install it (on Debian and Ubuntu with "
            "`apt install python3-venv`), or name another Python as in "
            "`make PYTHON=/path/to/python3.11`",
        ),
    ],
)
def test_one_sentence_says_what_is_missing(
    make: Make, checkout: Path, goal: str, python: str | None, sentence: str
) -> None:
    done = make(goal, python)
    assert done.returncode != 0
    assert done.stdout == ""
    place, said = done.stderr.strip().split(" *** ")
    assert place.startswith("Makefile:")
    assert said == f"{sentence}.  Stop."
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize("version", ["3.11.0", "3.14.0rc1", "4.0.0"])
def test_demo_installs_once(make: Make, checkout: Path, version: str) -> None:
    first, second = (make("demo", fake_python(version)) for _ in range(2))
    assert first.stderr == second.stderr == ""
    assert first.stdout.splitlines()[-1] == second.stdout.splitlines()[-1] == "rnnguard demo"
    assert calls(checkout) == ["venv", "install"]


def test_test_installs_for_demo_too_and_pytest_speaks_last(make: Make, checkout: Path) -> None:
    done = make("test", fake_python("3.11.7"))
    spoken = [line for line in done.stdout.splitlines() if not line.startswith((".venv", "OMP"))]
    assert spoken[1:] == ["ruff check .", "ruff format --check .", "mypy", "pytest -n 2"]
    make("demo", fake_python("3.11.7"))
    assert calls(checkout) == ["venv", "install"]


def test_a_change_of_pins_installs_again_into_the_same_environment(
    make: Make, checkout: Path
) -> None:
    make("demo", fake_python("3.11.7"))
    later = (checkout / ".venv" / ".demo").stat().st_mtime + 10
    os.utime(checkout / "constraints.txt", (later, later))
    make("demo", None)
    assert calls(checkout) == ["venv", "install", "install"]


def test_a_half_made_environment_is_made_anew(make: Make, checkout: Path) -> None:
    (checkout / "break").touch()
    assert make("demo", fake_python("3.11.7")).returncode != 0
    (checkout / "break").unlink()
    assert make("demo", fake_python("3.11.7")).returncode == 0
    assert calls(checkout) == ["venv", "install", "venv", "install"]


def test_an_interrupted_addition_spoils_the_whole_environment(make: Make, checkout: Path) -> None:
    make("demo", fake_python("3.11.7"))
    (checkout / "break").touch()
    assert make("test", None).returncode != 0
    (checkout / "break").unlink()
    assert make("demo", fake_python("3.11.7")).returncode == 0
    assert calls(checkout) == ["venv", "install", "install", "venv", "install"]


def test_an_environment_made_by_hand_is_kept(make: Make, checkout: Path) -> None:
    by_hand = checkout / ".venv" / "bin"
    by_hand.mkdir(parents=True)
    (by_hand / "python").write_text(fake_python("3.12.0"))
    (by_hand / "rnnguard").write_text("#!/bin/sh\necho by hand\n")
    for file in by_hand.iterdir():
        file.chmod(0o755)
    assert make("demo", None).stdout.splitlines()[-1] == "by hand"
    assert calls(checkout) == ["install"]
