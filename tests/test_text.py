"""The terminal view: what a user reads at 80 columns, with and without colour."""

from __future__ import annotations

import io
import math
from collections.abc import Callable

import pytest
from rich.console import Console
from test_report import (
    BY_HAND,
    made_up_finding,
    made_up_readings,
    made_up_report,
    made_up_run,
    made_up_site,
    stabilized_report,
)

from rnnguard.decision.selection import Suppressed
from rnnguard.measurements import Measurement
from rnnguard.records import Finding, Plan
from rnnguard.report.text import brief, plain
from rnnguard.report.words import FIXES, power, rule_page, shape, sparkline

AUDIT = """\
rnnguard {version}   torch 2.13.0   cpu fp32   seed 0   1.8 s
rests on real data (4 batches)
loss before training 2.303   gradient norm 1.9

site                       decay/step  T_eff(1e-2)  log10 R at memory  level
encoder.lstm                    0.630     9 of 100       -20.1 at 100  vanishing
LSTM(5 -> 32, 2 layers,                                      declared
bidir)

Gradient by lag: log10 R from 0 (full) to -6 (blank)
encoder.lstm
  now     0 ██▇▆▆▅▄▄▃▂▂▁                             100   R(100) = 9e-21

Findings
model.py:18  RG401 error  vanishing-through-time  encoder.lstm
    the gradient shrinks by 0.63 per step; after 100 steps 9e-21 of it is left.
    because retention_at_memory -20.07 (< -4)
    fix (values): rnnguard.stabilize(model, optimizer) sets the forget gate for
    the memory needed.
model.py:31  RG201 warning  bidirectional-last-step  encoder.lstm
    `out[:, -1]` reads a backward direction that has seen 1 of 100 steps.
    fix (manual): torch.cat([h_n[-2], h_n[-1]], dim=1)

Notes
Order of scenarios: first match wins.

2 findings (1 error, 1 warning).
1 can be mended by rnnguard.stabilize(model, optimizer).
1 to be mended by hand.
Explain: rnnguard rule RG401"""


def test_an_audit_reads_like_this() -> None:
    import rnnguard

    assert str(made_up_report()) == AUDIT.format(version=rnnguard.__version__)


def test_a_stabilization_shows_before_and_after() -> None:
    text = str(stabilized_report())
    for line in (
        "loss before training 2.303 -> 2.298   gradient norm 1.9 -> 1.1",
        "LSTM(5 -> 32, 2           -> 0.970  -> 100 of 100     -> -1.3 at 100  -> healthy",
        "  after   0 ███████████████████████▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇▇ 100   R(100) = 5e-02",
        "Mended\nmodel.py:18  RG401 error  vanishing-through-time  encoder.lstm\n",
        "encoder.lstm: Memory fades",
        "  applied     chrono_bias  (values)  longest 100\n",
        "      log10 R(100) from -20.1 to -1.3.\n",
        "  taken back  layer_norm  (structure)\n",
        "  applied     clip_gradient  (step)  norm 1.951\n",
        "Left alone\n`decoder`: the weights are trained. Only step changes were made. (RG902)",
        "1 finding left (1 warning). 1 mended.\n",
    ):
        assert line in text


@pytest.mark.parametrize("width", [80, 120])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    long = "model.encoder.blocks.0.temporal_attention.recurrent.lstm"
    readings = made_up_readings(level="at risk: expansive", memory_needed=1000)
    readings = readings.model_copy(update={"path": long})
    report = stabilized_report(
        sites=(made_up_site(long),),
        before=Measurement(run=made_up_run(), sites=(readings,)),
        after=Measurement(run=made_up_run(), sites=(readings,)),
    )
    lines = plain(report, width=width).splitlines()
    assert max(map(len, lines)) <= width
    assert "at risk:" in "\n".join(lines)


def test_a_pipe_gets_no_colour_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    file = io.StringIO()
    Console(file=file).print(stabilized_report())
    assert "\x1b" not in file.getvalue()
    assert "\x1b" not in str(stabilized_report())


@pytest.mark.parametrize("no_color", [False, True])
def test_a_terminal_gets_colour_unless_told_otherwise(no_color: bool) -> None:
    file = io.StringIO()
    console = Console(
        file=file, force_terminal=True, color_system="standard", no_color=no_color, width=80
    )
    console.print(made_up_report())
    assert ("\x1b[1;31m" in file.getvalue()) is not no_color
    assert "31m" not in file.getvalue() or not no_color


def test_an_old_encoding_gets_plain_characters() -> None:
    old = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    text = plain(stabilized_report(), file=old)
    assert text.isascii()
    assert "now" not in text
    assert "  before  0 @@" in text


def test_brackets_are_not_markup() -> None:
    finding = made_up_finding(message="cells[0] [*] [red]stay[/red]", path="cells[0]")
    text = str(made_up_report(findings=(finding,), remaining=(finding,)))
    assert "    cells[0] [*] [red]stay[/red]\n" in text


def test_no_site_is_said_loudly() -> None:
    report = made_up_report(
        sites=(), before=Measurement(run=made_up_run(), sites=()), findings=(), remaining=()
    )
    assert "\n0 sites: no recurrence was found" in str(report)
    assert str(report).endswith("No findings, but nothing was measured.")


def test_a_replayed_plan_says_that_nothing_was_measured() -> None:
    changes = stabilized_report().changes
    report = made_up_report(
        sites=(), before=Measurement(run=made_up_run(), sites=()), findings=(), remaining=(),
        changes=changes, plan=Plan(changes=changes),
    )  # fmt: skip
    assert "0 sites" not in str(report)
    assert str(report).endswith("3 changes made, but nothing was measured.")


def test_a_skipped_site_is_listed() -> None:
    report = made_up_report(sites=(made_up_site(), made_up_site("decoder")))
    assert "decoder" in str(report)
    assert "not measured" in str(report)


def test_a_plan_is_shown_where_nothing_was_done() -> None:
    report = made_up_report(plan=stabilized_report().plan)
    assert "What rnnguard.stabilize(model, optimizer) would do\n" in str(report)


def test_made_up_inputs_and_infinities_are_said() -> None:
    run = made_up_run(basis="inferred inputs", batches=1, nonfinite=True, loss=None)
    gone = made_up_readings(retention=(0.0, -1e4), retention_at_memory=-1e4)
    text = str(made_up_report(before=Measurement(run=run, sites=(gone,))))
    assert "rests on inferred inputs (1 batch)\ngradient norm" in text
    assert "The loss or a gradient is not finite." in text
    assert "-inf at 100" in text
    assert "R(1) = 0" in text


def test_unknown_memory_is_a_dash() -> None:
    unknown = made_up_readings(
        memory_needed=None, memory_source="unknown", retention_at_memory=None, level="unknown"
    )
    text = str(made_up_report(before=Measurement(run=made_up_run(), sites=(unknown,))))
    assert "9 of 100                  -  unknown" in text


def test_brief_leaves_the_readings_out() -> None:
    text = plain(made_up_report(), parts=brief)
    assert "decay/step" not in text
    assert "RG401 error" in text


def test_an_absolute_location_is_shown_from_here(monkeypatch: pytest.MonkeyPatch) -> None:
    from pathlib import Path

    finding = made_up_finding(location=str(Path.cwd() / "pkg" / "model.py") + ":7")
    text = str(made_up_report(findings=(finding,), remaining=(finding,)))
    assert "\npkg/model.py:7  RG401" in text


@pytest.mark.parametrize(
    ("log10", "text"),
    [(0.0, "1e+00"), (-18.3, "5e-19"), (-0.001, "1e+00"), (-400.5, "3e-401"), (2.3, "2e+02"),
     (-math.inf, "0"), (-1e4, "0")],
)  # fmt: skip
def test_powers_of_ten_do_not_underflow(log10: float, text: str) -> None:
    assert power(log10) == text


def test_shapes() -> None:
    assert shape(made_up_site()) == "LSTM(5 -> 32, 2 layers, bidir)"
    plain_rnn = made_up_site(module="RNN", cell="rnn_relu", layers=1, bidirectional=False)
    assert shape(plain_rnn) == "RNN(5 -> 32, relu)"


@pytest.mark.parametrize(
    ("curve", "line"),
    [
        ((), ""),
        ((0.0,), "█"),
        ((0.0, -3.0, -5.9, -6.0, -1e4), "█▄▁  "),
        ((0.0, math.nan, -math.inf), "█  "),
    ],
)
def test_sparklines(curve: tuple[float, ...], line: str) -> None:
    assert sparkline(curve, top=0) == line


def test_a_long_curve_keeps_its_ends() -> None:
    line = sparkline([0.0] * 999 + [-3.0], top=0)
    assert len(line) == 40
    assert (line[0], line[-1]) == ("█", "▄")


def test_growth_raises_the_scale() -> None:
    growing = made_up_readings(retention=tuple(k * 0.05 for k in range(101)), level="exploding")
    text = str(made_up_report(before=Measurement(run=made_up_run(), sites=(growing,))))
    assert "log10 R from 5 (full) to -6 (blank)" in text


def test_every_rule_of_the_book_has_a_page() -> None:
    from rnnguard.decision.rulebook import load_rulebook

    for rule in load_rulebook().rules:
        page = rule_page(rule)
        first = f"{rule.severity}; fix: {FIXES[rule.fix]}"
        assert page.startswith(f"# {rule.name} ({rule.code})\n\n{first}\n")
        assert "## What is wrong" in page


def test_what_comments_hide_is_counted() -> None:
    hidden = (Suppressed(finding=BY_HAND, reason="known", comment="model.py:12"),)
    text = str(made_up_report(suppressed=hidden))
    assert "2 findings (1 error, 1 warning). 1 suppressed.\n" in text
    assert "No findings. 1 suppressed." in str(
        made_up_report(findings=(), remaining=(), suppressed=hidden)
    )
    assert "suppressed" not in str(made_up_report())


def test_findings_of_every_fix_are_counted() -> None:
    informed: Finding = BY_HAND.model_copy(update={"severity": "info", "fix": "none"})
    text = str(made_up_report(findings=(informed,), remaining=(informed,)))
    assert "1 finding (1 info).\nExplain: rnnguard rule RG201" in text


PRINTED = """
import random

import torch

import rnnguard

random.seed(0)
before = random.getstate()
model = torch.nn.GRU(2, 4)
report = rnnguard.stabilize(model, torch.optim.Adam(model.parameters()), verbose=True)
assert len(str(report)) > 100
print("same" if random.getstate() == before else "drawn")
"""


def test_printing_draws_no_random_number(fresh_python: Callable[..., str]) -> None:
    """In a fresh process, since rich draws one only where it is imported for the first time."""
    assert fresh_python("-c", PRINTED).splitlines()[-1] == "same"
