"""The figure of a benchmark: gradient by lag and loss by epoch, drawn with matplotlib."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from rnnguard.bench.outcome import EPSILON, Outcome, Run
from rnnguard.errors import RNNGuardError
from rnnguard.report.figure import LOWEST

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg")
POINTS = 50
"""Means that a loss curve is drawn from, since single steps scatter by more than models differ."""


def check_possible(path: Path) -> None:
    """Raises RNNGuardError for a kind of file that is not drawn (RG920), or without matplotlib."""
    if path.suffix.lower() not in SUFFIXES:
        cure = "Give a name that ends in .png or .svg."
        raise RNNGuardError.of("RG920", "--plot", f"`{path}` is neither PNG nor SVG.", cure)
    if find_spec("matplotlib") is None:
        cure = "Run `pip install rnnguard[plot]`."
        raise RNNGuardError.of("RG918", "--plot", "matplotlib is not installed.", cure)


def write(outcome: Outcome, path: Path) -> None:
    """Draws the figure into a file, PNG or SVG by its suffix."""
    drawn(outcome).savefig(path)


def drawn(outcome: Outcome) -> Figure:
    """Retention by lag, dotted before training, and bits per character by epoch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    by_lag, by_epoch = figure.subplots(1, 2)
    for number, contender in enumerate(outcome.conditions.contenders):
        for place, run in enumerate(outcome.of(contender)):
            label = contender.label if place == 0 else None
            _draw_retention(by_lag, run, f"C{number}", label)
            _draw_losses(by_epoch, run, f"C{number}", label, outcome.per_epoch)
    by_lag.axhline(math.log10(EPSILON), color="0.6", linewidth=0.8)
    by_lag.axvline(outcome.conditions.length, color="0.6", linestyle="--", linewidth=0.8)
    curves = [curve for run in outcome.runs for curve in (run.before, run.after) if curve]
    by_lag.set_ylim(LOWEST, math.ceil(max((max(curve) for curve in curves), default=0.0)) + 0.5)
    by_lag.set_xlabel("lag in steps (dashed: window of training)")
    by_lag.set_ylabel("log10 of the gradient left")
    by_lag.set_title("Gradient by lag (dotted: before training; grey: 0.01)")
    by_epoch.set_xlabel("epochs")
    by_epoch.set_ylabel("bits per character")
    by_epoch.set_title("Training (dots: held-out text, after it)")
    for axes in (by_lag, by_epoch):
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    return figure


def _draw_retention(axes: Axes, run: Run, color: str, label: str | None) -> None:
    for curve, style in ((run.before, ":"), (run.after, "-")):
        if curve is not None:
            named = label if style == "-" else None
            axes.plot(range(len(curve)), curve, style, color=color, label=named, linewidth=1.2)


def _draw_losses(axes: Axes, run: Run, color: str, label: str | None, per_epoch: int) -> None:
    size = max(1, -(-len(run.losses) // POINTS))
    parts = [run.losses[start : start + size] for start in range(0, len(run.losses), size)]
    epochs = [(size * n + len(part) / 2) / per_epoch for n, part in enumerate(parts)]
    bits = [sum(part) / len(part) / math.log(2) for part in parts]
    axes.plot(epochs, bits, color=color, label=label, linewidth=1.2)
    if run.bits is not None:
        axes.plot(len(run.losses) / per_epoch, run.bits, "o", color=color)
