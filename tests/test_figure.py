"""The figure: lines of retention by lag on matplotlib axes."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from test_report import made_up_report, made_up_site, stabilized_report

from rnnguard.errors import RNNGuardError

matplotlib = pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def _no_window() -> Iterator[None]:
    matplotlib.use("Agg")
    yield
    from matplotlib import pyplot

    pyplot.close("all")


def test_an_audit_draws_one_line_per_site() -> None:
    ax = made_up_report().plot()
    (curve, *_) = [line for line in ax.lines if len(line.get_xdata()) > 2]
    assert list(curve.get_ydata())[:2] == list(made_up_report()["encoder.lstm"].retention[:2])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["encoder.lstm"]


def test_before_and_after_are_told_apart_on_given_axes() -> None:
    from matplotlib import pyplot

    _, ax = pyplot.subplots()
    report = stabilized_report(sites=(made_up_site(), made_up_site("decoder")))
    assert report.plot(ax) is ax
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["encoder.lstm (before)", "encoder.lstm (after)"]
    assert ax.get_ylim()[0] == -10


def test_the_memory_needed_is_marked() -> None:
    ax = made_up_report().plot()
    assert any(list(line.get_xdata()) == [100, 100] for line in ax.lines)


def test_no_site_draws_empty_axes() -> None:
    assert made_up_report(sites=()).plot().get_legend() is None


def test_a_missing_matplotlib_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RNNGuardError) as caught:
        made_up_report().plot()
    assert str(caught.value) == (
        "matplotlib is not installed. Run `pip install rnnguard[plot]`. (RG918)"
    )
