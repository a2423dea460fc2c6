"""The retention by lag, drawn with matplotlib."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rnnguard.errors import RNNGuardError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from rnnguard.report.report import Report

# log10 of the bounds of the health table, where a curve is worth a line.
EXPLODING, FADING, VANISHING = 2.0, math.log10(5e-2), -6.0
LOWEST = -10.0  # log10 R at the foot of the axis; below it nothing is learned anyway


def draw(report: Report, ax: Axes | None = None) -> Axes:
    """One line per site and look on `ax`, a fresh figure's when None; steps against log10 R."""
    ax = ax or _fresh_axes()
    highest = 0.0
    for number, site in enumerate(report.sites):
        for name, measurement in report.looks:
            if site.path not in measurement:
                continue
            curve = measurement[site.path].retention
            highest = max([highest, *filter(math.isfinite, curve)])
            label = site.label if report.after is None else f"{site.label} ({name})"
            style = ":" if name == "before" else "-"
            ax.plot(range(len(curve)), curve, style, color=f"C{number % 10}", label=label)
    needed = {s.memory_needed for s in report.now.sites if s.memory_needed is not None}
    for steps in sorted(needed):
        ax.axvline(steps, color="0.5", linestyle="--", linewidth=1)
    ax.axhline(FADING, color="0.7", linewidth=0.8)
    ax.axhline(VANISHING, color="0.7", linewidth=0.8)
    ax.set_ylim(LOWEST, math.ceil(highest) + 0.5)
    ax.set_xlabel("lag in steps (dashed: memory needed)")
    ax.set_ylabel("log10 of the gradient left")
    ax.set_title("Gradient by lag (grey: fading at 0.05, vanishing at 1e-6)")
    if report.sites:
        ax.legend()
    return ax


def _fresh_axes() -> Axes:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        cure = "Run `pip install rnnguard[plot]`."
        raise RNNGuardError.of("RG918", "", "matplotlib is not installed.", cure) from error
    _, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    drawn: Axes = axes
    return drawn
