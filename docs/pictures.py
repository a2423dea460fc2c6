"""A rule's picture: how much gradient is left by lag in its example and in the healthy twin."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from docs.catalogue import Kind, audited
from rnnguard.decision.rulebook import Rule
from rnnguard.report.report import Report

TITLES: dict[Kind, str] = {"example": "as in the example", "twin": "healthy twin"}
# Without these two the file would differ from run to run.
STEADY: Any = {"svg.hashsalt": "rnnguard", "svg.fonttype": "none"}
NO_DATE: dict[str, Any] = {"Date": None}


def picture(rule: Rule) -> str | None:
    """SVG with both curves side by side; None for a rule whose example has no recurrence."""
    with tempfile.TemporaryDirectory() as folder:
        reports = {kind: audited(rule, kind, Path(folder)) for kind in TITLES}
    if not any(report.sites for report in reports.values()):
        return None
    with matplotlib.rc_context(STEADY):
        return _drawn(reports)


def _drawn(reports: dict[Kind, Report]) -> str:
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    axes = figure.subplots(1, len(reports), sharey=True)
    for ax, (kind, report) in zip(axes, reports.items(), strict=True):
        report.plot(ax)
        codes = sorted({f.code for f in report.remaining if f.severity != "info"})
        ax.set_title(f"{TITLES[kind]}: {report.level}{', ' if codes else ''}{' '.join(codes)}")
    axes[1].set_ylabel("")
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata=NO_DATE)
    return file.getvalue()
