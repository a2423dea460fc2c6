"""Files are written whole or not at all, whatever happens to the process that writes."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from test_report import made_up_report

from rnnguard.cli import _deliver
from rnnguard.files import write_text
from rnnguard.report import Report

ROOT = Path(__file__).resolve().parents[1]
OLD, NEW = "old " * 10_000, "new " * 500_000


def test_a_new_file_holds_the_text(tmp_path: Path) -> None:
    write_text(tmp_path / "plan.json", "{}\n")
    assert (tmp_path / "plan.json").read_bytes() == b"{}\n"
    assert os.listdir(tmp_path) == ["plan.json"]


def test_permissions_are_those_of_a_plain_open(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        (tmp_path / "plain").write_text("x")
        write_text(tmp_path / "ours", "x")
    finally:
        os.umask(before)
    modes = {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "ours")}
    assert modes["plain"] == modes["ours"] == 0o640


@pytest.mark.parametrize("mode", [0o600, 0o664])
def test_an_existing_file_keeps_its_permissions(tmp_path: Path, mode: int) -> None:
    file = tmp_path / "report.html"
    file.write_text(OLD)
    file.chmod(mode)
    write_text(file, NEW)
    assert stat.S_IMODE(file.stat().st_mode) == mode
    assert file.read_text() == NEW


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    real, link = tmp_path / "real" / "plan.json", tmp_path / "plan.json"
    link.symlink_to(real)
    write_text(link, "first")
    write_text(link, "second")
    assert link.is_symlink() and real.read_text() == "second"
    assert os.listdir(tmp_path / "real") == ["plan.json"]


def test_a_device_is_written_to_and_stays_one(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_text(pipe, "through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_the_longest_name_fits(tmp_path: Path) -> None:
    name = "n" * 250 + ".json"
    write_text(tmp_path / name, "x")
    assert os.listdir(tmp_path) == [name]


def test_a_read_only_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, real = tmp_path / "plan.json", os.open
    file.write_text("old")

    def as_for_a_read_only_file(path: Path, flags: int, *more: int) -> int:
        if path == file and flags & os.O_WRONLY:
            raise PermissionError(path)
        return real(path, flags, *more)

    # Root may write to everything, so that the mode alone shows nothing here.
    monkeypatch.setattr(os, "open", as_for_a_read_only_file)
    with pytest.raises(PermissionError):
        write_text(file, "new")
    assert file.read_text() == "old" and os.listdir(tmp_path) == ["plan.json"]


def test_a_folder_is_refused_as_by_open(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        write_text(tmp_path, "x")
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "none" / "plan.json", "x")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), MemoryError()])
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
) -> None:
    file = tmp_path / "report.json"
    file.write_text(OLD)

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(type(error)):
        write_text(file, NEW)
    assert file.read_text() == OLD
    assert os.listdir(tmp_path) == ["report.json"]


CHILD = """
import os, sys, time
from rnnguard.files import write_text

def slowed(name):
    real = getattr(os, name)
    def slow(*arguments):
        print(name, flush=True)
        time.sleep(60)
        return real(*arguments)
    setattr(os, name, slow)

path, where = sys.argv[1:]
if where == "anywhere":
    print("writing", flush=True)
    while True:
        write_text(path, "new " * 500_000)
slowed(where)
write_text(path, "new " * 500_000)
"""


def killed_while_writing(path: Path, where: str, after: float = 0.0) -> None:
    command = [sys.executable, "-c", CHILD, str(path), where]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline()
        time.sleep(after)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_process_killed_in_the_middle_leaves_the_old_file(tmp_path: Path, where: str) -> None:
    file = tmp_path / "report.json"
    file.write_text(OLD)
    killed_while_writing(file, where)
    assert file.read_text() == OLD
    stale = [each for each in tmp_path.iterdir() if each != file]
    # What the kill left behind is no report by any pattern that looks for one.
    assert len(stale) == 1 and stale[0].suffix == ".tmp" and stale[0].name.startswith(".")
    assert list(tmp_path.glob("*.json")) == [file]
    write_text(file, NEW)
    assert file.read_text() == NEW


@pytest.mark.parametrize("after", [0.003, 0.011, 0.03, 0.07])
def test_a_process_killed_at_any_time_leaves_one_whole_file(tmp_path: Path, after: float) -> None:
    file = tmp_path / "report.json"
    file.write_text(OLD)
    killed_while_writing(file, "anywhere", after)
    assert file.read_text() in (OLD, NEW)


# --- the doors that write ----------------------------------------------------------------


def through_the_command_line(report: Report, file: Path) -> None:
    _deliver(report, "text", file, quiet=False)


DOORS: dict[str, Callable[[Report, Path], object]] = {
    "plan": lambda report, file: report.plan.to_json(file),
    "json": lambda report, file: report.to_json(file),
    "html": lambda report, file: report.to_html(file),
    "command line": through_the_command_line,
}


@pytest.mark.parametrize("door", DOORS)
def test_every_door_writes_whole_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, door: str
) -> None:
    report, file = made_up_report(), tmp_path / "out"
    DOORS[door](report, file)
    written = file.read_text(encoding="utf-8")
    assert len(written) > 20
    file.write_text(OLD)

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        DOORS[door](report, file)
    assert file.read_text() == OLD and os.listdir(tmp_path) == ["out"]
