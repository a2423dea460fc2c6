"""The demo tells its whole story, at a few steps, and is honest about what came of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rnnguard import demo


@pytest.fixture
def printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """What a short demo prints, run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    demo.run(steps=3)
    return capsys.readouterr().out


def test_report_page_and_table(printed: str, tmp_path: Path) -> None:
    page = (tmp_path / "rnnguard-demo.html").read_text(encoding="utf-8")
    assert page.lstrip().lower().startswith("<!doctype html") and "orthogonal" in page
    assert [file.name for file in tmp_path.iterdir()] == ["rnnguard-demo.html"]
    for word in ("before", "after", "orthogonal", "rnnguard-demo.html", "After 3 training steps"):
        assert word in printed
    assert "untouched" in printed and "stabilized" in printed
    assert printed.count("%") == 2


def test_no_progress_bar_in_a_file(printed: str) -> None:
    assert "training, untouched" not in printed and "\x1b" not in printed


def test_the_page_goes_where_it_is_told(tmp_path: Path) -> None:
    demo.run(output=tmp_path / "page.html", steps=1)
    assert (tmp_path / "page.html").is_file()


def test_leaves_random_state_and_threads_alone(tmp_path: Path) -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    demo.run(output=tmp_path / "page.html", steps=1)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


def test_digits_are_sequences_of_64_pixels() -> None:
    (x, y), (held_out_x, held_out_y) = demo.digit_sequences()
    assert x.shape == (1437, 64, 1) and y.shape == (1437,)
    assert held_out_x.shape == (360, 64, 1) and held_out_y.shape == (360,)
    assert x.dtype == torch.float32 and x.min() == 0 and x.max() == 1
    assert y.unique().tolist() == list(range(10))


def test_twins_are_equal_and_see_the_same_batches() -> None:
    (one, _), (other, _) = demo.built(7), demo.built(7)
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    examples = torch.arange(100.0).view(100, 1, 1), torch.arange(100)
    first, again = (demo.drawn_batches(examples, 3, seed=1) for _ in range(2))
    assert all(torch.equal(a[1], b[1]) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(
    ("before", "after", "sentence"),
    [
        (0.6, 0.9, "The stabilized model names 30.0 points more rightly."),
        (0.9, 0.6, "The stabilized model names 30.0 points fewer rightly."),
        (0.7, 0.72, "No clear difference: 2.0 points apart on 360 digits, within chance."),
        (1.0, 1.0, "No clear difference: 0.0 points apart on 360 digits, within chance."),
    ],
)
def test_the_sentence_says_whichever_way_it_went(
    before: float, after: float, sentence: str
) -> None:
    assert demo.verdict(before, after, 360) == sentence
