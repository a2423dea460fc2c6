"""The text that is learned: read, checked and split; no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rnnguard.bench.conditions import Conditions
from rnnguard.errors import RefusedError, RNNGuardError

SEQUENCES = 8
"""Parallel sequences that the held-out text is cut into."""
BUILT_IN = "pydoc_data.topics"


@dataclass(frozen=True)
class Text:
    """A text in two parts, the last tenth held out; `characters` are all that occur in it."""

    name: str
    training: str
    held_out: str
    characters: str

    @classmethod
    def of(cls, name: str, text: str) -> Text:
        start = len(text) - len(text) // 10
        return cls(name, text[:start], text[start:], "".join(sorted(set(text))))

    def check_length(self, conditions: Conditions) -> None:
        """Raises RefusedError (RG920) where it is too short for a batch, or to be measured on."""
        length, batch = conditions.length, conditions.batch
        # A window to warm up, one to measure, and the character after it.
        held_out = SEQUENCES * (2 * length + 1)
        needed = max(10 * held_out, -(-10 * batch * (length + 1) // 9))
        found = len(self.training) + len(self.held_out)
        if found < needed:
            fact = f"it has {found} characters, where {needed} are needed."
            cure = "Name a longer text, or give a smaller --length or --batch."
            raise RefusedError.of("RG920", self.name, fact, cure)

    def window(self, conditions: Conditions) -> int:
        """Steps to measure over in each held-out sequence, behind those to warm up."""
        return min(conditions.longest, len(self.held_out) // SEQUENCES - conditions.length - 1)


def built_in_text() -> Text:
    """The language reference that comes with Python, in English."""
    from pydoc_data.topics import topics

    return Text.of(BUILT_IN, "\n".join(topics.values()))


def read_text(path: Path | None) -> Text:
    """A file's text, by default the built-in one; RNNGuardError (RG920) where it is none."""
    if path is None:
        return built_in_text()
    cure = "Name a text file."
    if not path.exists():
        raise _unreadable(path, "there is no such file.", "Check the path.")
    if path.is_dir():
        raise _unreadable(path, "it is a folder.", cure)
    try:
        held = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, f"it cannot be read: {error.strerror}.", cure) from error
    if not held.strip():
        raise _unreadable(path, "it is empty.", cure)
    cure = "Name a text file, in UTF-8: `iconv -t utf-8` converts one."
    if b"\0" in held:
        fact = f"it is not text: byte {held.index(0)} is 0."
        raise _unreadable(path, fact, cure)
    try:
        text = held.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        fact = f"it is not text in UTF-8, from byte {error.start} on."
        raise _unreadable(path, fact, cure) from error
    return Text.of(str(path), text.replace("\r\n", "\n").replace("\r", "\n"))


def _unreadable(path: Path, fact: str, cure: str) -> RNNGuardError:
    return RefusedError.of("RG920", str(path), fact, cure)
