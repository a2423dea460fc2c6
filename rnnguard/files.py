"""Files that are written whole or not at all; no torch."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from pathlib import Path


def write_text(path: str | Path, text: str) -> None:
    """Puts `text` in a file so that a reader sees the old content or the new, never half of it.

    The text goes into a file of another name beside it, which then takes its place; that one
    is removed when anything fails, and ends in `.tmp` where the process was killed. Links are
    followed, and permissions are those that a plain `open` would leave. Raises OSError as
    `open` does. Devices and pipes, which cannot be replaced, are written to directly.
    """
    target = Path(os.path.realpath(path))
    mode = _mode_of(target)
    if mode is not None and not stat.S_ISREG(mode):
        target.write_text(text, encoding="utf-8")
        return
    # Short and hidden: the longest name that the folder allows must still fit.
    beside = target.with_name(f".{target.name[:40]}.{secrets.token_hex(6)}.tmp")
    try:
        with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
            file.write(text.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
        if mode is not None:
            os.chmod(beside, stat.S_IMODE(mode))
        os.replace(beside, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise


def _mode_of(target: Path) -> int | None:
    """The mode of an existing file that may be written to; nothing where there is none."""
    try:
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISREG(mode):
        os.close(os.open(target, os.O_WRONLY))  # a read-only file is refused, as by a plain open
    return mode
