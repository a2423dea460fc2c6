"""The report as one self-contained page: no script, no file beside it, light and dark."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2

import rnnguard
from rnnguard.measurements import Site, SiteReadings
from rnnguard.report.figure import EXPLODING, FADING, LOWEST
from rnnguard.report.words import NO_SITES, closing, dose, place, power, shape

if TYPE_CHECKING:
    from rnnguard.report.report import Report

WIDTH, HEIGHT = 640, 200
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 12, 34
MOST_POINTS = 400


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: where it stands and what it says."""

    at: float
    label: str


@dataclass(frozen=True)
class Chart:
    """The geometry of one site's drawing, in SVG user units."""

    lines: tuple[tuple[str, str], ...]
    lags: tuple[Tick, ...]
    decades: tuple[Tick, ...]
    healthy: tuple[float, float]
    needed: Tick | None


def page(report: Report) -> str:
    """The whole HTML document."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"power": power, "place": place, "dose": dose, "shape": shape}
    environment.filters["at_memory"] = _at_memory
    template = environment.get_template("report.html.j2")
    size = {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP}
    return template.render(
        report=report,
        version=rnnguard.__version__,
        charts={site.path: chart(report, site) for site in report.sites},
        closing=closing(report),
        no_sites=NO_SITES,
        frame=size | {"bottom": BOTTOM},
    )


def frame(report: Report) -> str:
    """The page inside a frame, so that its styles leave a notebook's alone."""
    document = html.escape(page(report), quote=True)
    style = "width:100%;height:34rem;border:0"
    return f'<iframe title="rnnguard report" srcdoc="{document}" style="{style}"></iframe>'


def chart(report: Report, site: Site) -> Chart | None:
    """Where the lines, ticks and thresholds of a site's drawing stand; None when unmeasured."""
    seen = [(name, look[site.path]) for name, look in report.looks if site.path in look]
    if not seen:
        return None
    longest = max(len(readings.retention) for _, readings in seen)
    last = max(longest - 1, 1)
    finite = [v for _, r in seen for v in r.retention if math.isfinite(v)]
    highest = max(0, math.ceil(max(finite, default=0.0)))

    def x(lag: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * lag / last, 1)

    def y(log10: float) -> float:
        low, high = LOWEST, highest + 0.5
        part = (high - min(max(log10, low), high)) / (high - low)
        return round(TOP + (HEIGHT - TOP - BOTTOM) * part, 1)

    decades = range(0, highest + 1, _step(highest)) if highest > 10 else range(-10, highest + 1, 2)
    return Chart(
        lines=tuple((name, _points(r.retention, x, y)) for name, r in seen),
        lags=tuple(Tick(x(lag), str(lag)) for lag in _round_lags(last)),
        decades=tuple(Tick(y(d), str(d)) for d in decades),
        healthy=(y(EXPLODING), y(FADING)),
        needed=_needed(seen[-1][1], last, x),
    )


def _points(
    curve: Sequence[float], x: Callable[[float], float], y: Callable[[float], float]
) -> str:
    """The points of a polyline down to the foot, thinned where there are more lags than pixels."""
    stride = max(1, math.ceil(len(curve) / MOST_POINTS))
    lags = sorted({*range(0, len(curve), stride), *range(len(curve))[-1:]})
    before = [0, *lags]
    drawn = (k for j, k in zip(before, lags, strict=False) if max(curve[j], curve[k]) >= LOWEST)
    return " ".join(f"{x(k)},{y(curve[k])}" for k in drawn)


def _step(span: int) -> int:
    """A round step that gives about five marks over a span."""
    unit: int = 10 ** max(0, math.floor(math.log10(max(1, span / 5))))
    return next(m * unit for m in (1, 2, 5, 10) if m * unit >= span / 5)


def _round_lags(last: int) -> list[int]:
    """About five round lags, and the last one."""
    step = _step(last)
    # A round lag too near to the last one would print over it.
    return [*(lag for lag in range(0, last, step) if last - lag > step / 2), last]


def _needed(readings: SiteReadings, last: int, x: Callable[[float], float]) -> Tick | None:
    steps = readings.memory_needed
    if steps is None:
        return None
    word = f"{steps} steps needed ({readings.memory_source})"
    return Tick(x(min(steps, last)), word if steps <= last else f"{word}, beyond the window")


def _at_memory(readings: SiteReadings) -> str:
    if readings.retention_at_memory is None:
        return "unknown"
    needed = f"{readings.memory_needed} ({readings.memory_source})"
    return f"{power(readings.retention_at_memory)} at {needed}"
