"""Whole audits of models whose code, or whose settings, say what need not be told."""

from __future__ import annotations

import importlib
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import rnnguard

CODE = """
    import torch
    from torch import nn


    class Tagger(nn.Module):{net}
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(5, 16, batch_first=True, bidirectional=True){rnn}
            self.fc = nn.Linear(32, 3){fc}

        def forward(self, x):
            out = self.rnn(x)[0]
            return self.fc(out[:, -1]){read}
"""
Write = Callable[..., ModuleType]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes the model with comments in it, and imports it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(**comments: str) -> ModuleType:
        places = {"net": "", "rnn": "", "fc": "", "read": ""}
        text = CODE.format(**places | {name: f"  {text}" for name, text in comments.items()})
        (tmp_path / "tagger.py").write_text(textwrap.dedent(text).lstrip())
        sys.modules.pop("tagger", None)
        importlib.invalidate_caches()
        return importlib.import_module("tagger")

    yield write
    sys.modules.pop("tagger", None)


def audited(made: ModuleType, **options: Any) -> rnnguard.Report:
    model = made.Tagger()
    return rnnguard.audit(model, inputs=torch.randn(6, 20, 5), **{"memory": 8} | options)


def codes(report: rnnguard.Report) -> list[str]:
    return [finding.code for finding in report.remaining]


def idle(report: rnnguard.Report) -> list[str]:
    return [f"{f.location} {f.message}" for f in report.remaining if f.code == "RG005"]


def test_without_a_comment_the_fault_is_found(write: Write) -> None:
    report = audited(write())
    assert "RG201" in codes(report)
    assert report.suppressed == ()


@pytest.mark.parametrize("word", ["RG201", "bidirectional-last-step"])
def test_beside_the_module_it_is_hidden(write: Write, word: str) -> None:
    report = audited(write(rnn=f"# rnnguard: ignore[{word}] tags are read in pairs"))
    assert "RG201" not in codes(report)
    assert report.ok and idle(report) == []
    (hidden,) = report.suppressed
    assert (hidden.finding.code, hidden.reason) == ("RG201", "tags are read in pairs")
    assert hidden.comment == "tagger.py:8"
    assert " 1 suppressed." in str(report)


def test_where_it_is_found_it_is_hidden(write: Write) -> None:
    found = next(f for f in audited(write()).findings if f.code == "RG201")
    line = int(str(found.location).rpartition(":")[2])
    made = write()
    lines = Path("tagger.py").read_text().splitlines()
    indent = lines[line - 1][: -len(lines[line - 1].lstrip())]
    lines.insert(line - 1, f"{indent}# rnnguard: ignore[RG201] so be it")
    Path("tagger.py").write_text("\n".join(lines) + "\n")
    sys.modules.pop("tagger")
    importlib.invalidate_caches()
    made = importlib.import_module("tagger")
    report = audited(made)
    assert "RG201" not in codes(report)
    assert len(report.suppressed) == 1


def test_what_hides_nothing_is_told(write: Write) -> None:
    report = audited(
        write(
            rnn="# rnnguard: ignore[RG201, RG102]",
            fc="# rnnguard: ignore[no-such-rule]",
            read="# rnnguard: ignore",
        )
    )
    assert idle(report) == [
        "tagger.py:8 there is no finding of RG102 to hide.",
        "tagger.py:9 'no-such-rule' is not a known rule; `rnnguard rule` lists them all.",
        "tagger.py:13 it names no rule, so it hides nothing; write `# rnnguard: ignore[RG201] "
        "reason`.",
    ]
    assert report.ok


def test_what_goes_by_no_line_is_hidden_at_the_models_class(write: Write) -> None:
    made = write(net="# rnnguard: ignore[no-clipping] the loop clips")
    model = made.Tagger()
    optimizer = torch.optim.Adam(model.parameters())
    report = rnnguard.audit(model, optimizer, inputs=torch.randn(6, 20, 5), memory=8)
    assert "RG501" not in codes(report)
    assert [s.finding.code for s in report.suppressed] == ["RG501"]


def test_stabilize_tells_the_same(write: Write) -> None:
    made = write(rnn="# rnnguard: ignore[RG201] so be it")
    model = made.Tagger()
    optimizer = torch.optim.Adam(model.parameters())
    report = rnnguard.stabilize(model, optimizer, inputs=torch.randn(6, 20, 5), memory=8)
    assert "RG201" not in {f.code for f in (*report.findings, *report.remaining)}
    assert [s.finding.code for s in report.suppressed] == ["RG201"]
    assert idle(report) == []


def test_settings_may_be_given_as_a_file(write: Write, tmp_path: Path) -> None:
    made = write()
    file = tmp_path / "elsewhere" / "pyproject.toml"
    file.parent.mkdir()
    file.write_text("[tool.rnnguard]\nper-site-ignores = { rnn = ['RG2'] }\n")
    for rules in (file, str(file), [file]):
        assert "RG201" not in codes(audited(made, rules=rules))
    # Nothing is taken from the working directory that was not given.
    (tmp_path / "pyproject.toml").write_text("[tool.rnnguard]\nignore = ['RG201']\n")
    assert "RG201" in codes(audited(made))


def test_thresholds_and_severities_of_settings_hold(write: Write, tmp_path: Path) -> None:
    made, file = write(), tmp_path / "rnnguard.toml"
    file.write_text(
        "severity = { RG201 = 'info' }\nthresholds = { RG107 = { saturation = '> -1' } }\n"
    )
    assert "RG107" not in codes(audited(made))
    found = {finding.code: finding for finding in audited(made, rules=file).remaining}
    assert found["RG201"].severity == "info"
    assert found["RG107"].evidence["saturation"].endswith("(> -1)")
