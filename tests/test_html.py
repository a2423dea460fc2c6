"""The page: self-contained, escaped, well-formed, light and dark."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from test_report import (
    made_up_finding,
    made_up_readings,
    made_up_report,
    made_up_run,
    made_up_site,
    stabilized_report,
)

from rnnguard.measurements import Measurement
from rnnguard.report import Report

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Checker(HTMLParser):
    """Every tag that opens closes, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def drawings(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def points(drawing: ElementTree.Element) -> dict[str, list[tuple[float, ...]]]:
    return {
        line.attrib["class"]: [
            tuple(map(float, p.split(","))) for p in line.attrib["points"].split()
        ]
        for line in drawing.iter("polyline")
    }


def with_curve(*curve: float) -> Report:
    readings = made_up_readings(retention=curve)
    return made_up_report(before=Measurement(run=made_up_run(), sites=(readings,)))


@pytest.mark.parametrize(
    "report", [made_up_report(), stabilized_report(), made_up_report(sites=())]
)
def test_the_page_is_well_formed_and_stands_alone(report: Report) -> None:
    page = report.to_html()
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert page.startswith("<!doctype html>")
    assert not re.search(r"<script|<link|src=|href=|url\(|https?:", page)
    assert "prefers-color-scheme: dark" in page


def test_before_and_after_are_drawn_per_site() -> None:
    report = stabilized_report(sites=(made_up_site(), made_up_site("decoder")))
    (drawing,) = drawings(report.to_html())
    assert set(points(drawing)) == {"curve before", "curve after"}
    assert "not measured" in report.to_html()
    (alone,) = drawings(made_up_report().to_html())
    assert set(points(alone)) == {"curve now"}


def test_the_curve_stays_inside_and_stops_at_the_foot() -> None:
    (drawing,) = drawings(with_curve(0.0, -2.0, -1e4, -1e4, -1e4).to_html())
    drawn = points(drawing)["curve now"]
    assert len(drawn) == 3
    assert drawn[0][1] < drawn[1][1] < drawn[2][1]
    assert all(0 <= x <= 640 and 0 <= y <= 200 for x, y in drawn)


def test_a_growing_curve_scales_the_axis() -> None:
    (drawing,) = drawings(with_curve(*(0.5 * k for k in range(201))).to_html())
    drawn = points(drawing)["curve now"]
    assert all(0 <= y <= 200 for _, y in drawn)
    assert drawn[-1][1] < drawn[0][1]
    labels = [text.text for text in drawing.iter("text")]
    assert {"0", "20", "100"} <= set(labels)
    assert len(labels) < 16


def test_a_long_curve_is_thinned() -> None:
    (drawing,) = drawings(with_curve(*([0.0] * 5000)).to_html())
    assert len(points(drawing)["curve now"]) <= 402


@pytest.mark.parametrize("curve", [(), (0.0,), (0.0, -1.0)])
def test_short_curves_are_drawn(curve: tuple[float, ...]) -> None:
    assert len(drawings(with_curve(*curve).to_html())) == 1


def test_users_words_are_escaped() -> None:
    finding = made_up_finding(message="<script>alert(1)</script>", path="a<b>")
    page = made_up_report(remaining=(finding,), sites=(made_up_site("x<y>"),)).to_html()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "a&lt;b&gt;" in page
    assert "x&lt;y&gt;" in page


def test_the_page_says_what_the_terminal_says() -> None:
    page = html.unescape(stabilized_report().to_html())
    for words in (
        "rests on real data", "9e-21 at 100 (declared)", "RG201", "(mended)", "taken back",
        "log10 R(100) from -20.1 to -1.3.", "norm 1.951", "the weights are trained.",
        "first match wins", "1 finding left (1 warning). 1 mended.",
    ):  # fmt: skip
        assert words.lower() in page.lower()
    nothing = made_up_report(sites=(), before=Measurement(run=made_up_run(), sites=()))
    assert "0 sites: no recurrence was found" in nothing.to_html()


def test_the_page_is_written_where_told(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    assert stabilized_report().to_html(path) == path.read_text(encoding="utf-8")


def test_a_notebook_gets_the_page_in_a_frame() -> None:
    report = stabilized_report()
    framed = report._repr_html_()
    document = re.fullmatch(
        r'<iframe title="rnnguard report" srcdoc="([^"]*)" [^>]*></iframe>', framed
    )
    assert document is not None
    assert html.unescape(document[1]) == report.to_html()
