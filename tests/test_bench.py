"""The benchmark of four character models: its figures by hand, its command as a user meets it."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rnnguard
from rnnguard.bench import figure, story, training
from rnnguard.bench.conditions import CONTENDERS, Conditions, Contender, conditions
from rnnguard.bench.models import RECURRENCES, CharacterModel, built, weights_of
from rnnguard.bench.outcome import Outcome, Run
from rnnguard.bench.table import plain
from rnnguard.bench.text import SEQUENCES, Text, read_text
from rnnguard.cli import main

RNN, LSTM, LN_LSTM, INDRNN = CONTENDERS
WORDS = "the quick brown fox jumps over a lazy dog, again and again; "
TEXT = Text.of("words", "".join(WORDS[i % 7 :] for i in range(70)))
SMALL = ("--hidden", "6", "--length", "8", "--batch", "4", "--steps", "3")


def small(**options: Any) -> Conditions:
    return conditions(**{"hidden": 6, "length": 8, "batch": 4, "steps": 3} | options)


def made(contender: Contender, seed: int = 0) -> CharacterModel:
    return built(contender, small(), len(TEXT.characters), seed)[0]


@pytest.fixture
def text_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The text in a file of the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    file = tmp_path / "words.txt"
    file.write_text(TEXT.training + TEXT.held_out)
    return file


# The text


def test_the_last_tenth_is_held_out_and_all_characters_are_known() -> None:
    text = Text.of("x", "abcdefghij" * 3 + "z")
    assert (text.training, text.held_out) == ("abcdefghij" * 2 + "abcdefgh", "ijz")
    assert text.characters == "abcdefghijz"


def test_the_built_in_text_is_long() -> None:
    text = read_text(None)
    assert len(text.training) > 100_000 and "lambda" in text.training
    text.check_length(conditions())


def test_a_file_is_read_as_characters(tmp_path: Path) -> None:
    file = tmp_path / "t.txt"
    file.write_bytes("\ufeffé\r\n𝄞\rx".encode())
    text = read_text(file)
    assert text.training + text.held_out == "é\n𝄞\nx"


def test_rows_hold_the_text_in_order() -> None:
    rows = training.streams("aé𝄞bcaé", "abcé𝄞", 3)
    assert rows.tolist() == [[0, 3], [4, 1], [2, 0]]


def test_windows_go_through_a_row_once() -> None:
    rows = torch.arange(24).view(2, 12)
    windows = training.windows_of(rows, 5)
    assert torch.cat([ids for ids, _ in windows], 1).equal(rows[:, :-1])
    assert torch.cat([following for _, following in windows], 1).equal(rows[:, 1:])
    assert [ids.shape[1] for ids, _ in windows] == [5, 5, 1]
    full = training.training_windows(TEXT, batch=4, length=8, device="cpu")
    assert {ids.shape for ids, _ in full} == {(4, 8)}
    assert len(full) == (len(TEXT.training) // 4 - 1) // 8


# The models


def test_every_contender_can_be_built_and_has_a_name_of_its_own() -> None:
    assert [c.name for c in CONTENDERS] == list(RECURRENCES)
    assert len({c.label for c in CONTENDERS}) == len(CONTENDERS)


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda c: c.name)
def test_weights_are_counted_that_can_have_a_gradient(contender: Contender) -> None:
    model = made(contender)
    logits, _ = model(torch.arange(24).view(3, 8))
    logits.square().sum().backward()
    off_diagonal = 0
    if contender is INDRNN:
        for layer in range(2):
            gradient = model.recurrence.get_parameter(f"weight_hh_l{layer}").grad
            assert isinstance(gradient, Tensor)
            others = ~torch.eye(6, dtype=torch.bool)
            assert not gradient[others].any()
            off_diagonal += int(others.sum())
    assert weights_of(model) == sum(p.numel() for p in model.parameters()) - off_diagonal


def test_one_seed_gives_one_model_and_leaves_chance_alone() -> None:
    state = torch.get_rng_state()
    one, same, other = (list(made(LSTM, seed).parameters()) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda c: c.name)
def test_norms_are_those_before_the_clip_and_one_model_is_clipped(contender: Contender) -> None:
    tight = replace(contender, clip=contender.clip and 1e-3)
    model, optimizer = built(tight, small(), len(TEXT.characters), seed=0)
    windows = training.training_windows(TEXT, 4, 8, "cpu")
    (steps,) = training.train_(model, optimizer, windows, 1)
    left = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()
    if contender is LN_LSTM:
        assert steps.norms[0] > 0.1 and float(left) == pytest.approx(1e-3, rel=1e-2)
    else:
        assert steps.norms[0] == pytest.approx(float(left), rel=1e-5)


# Training


def plain_losses(contender: Contender, length: int, batch: int, steps: int) -> list[float]:
    """What a loop that indexes the text itself gets: nats per character of every step."""
    model, optimizer = built(contender, small(), len(TEXT.characters), seed=0)
    stream = len(TEXT.training) // batch
    state, position, losses = None, 0, []
    for _ in range(steps):
        if position + length + 1 > stream:
            state, position = None, 0
        parts = [
            TEXT.training[i * stream :][position : position + length + 1] for i in range(batch)
        ]
        ids = torch.tensor([[TEXT.characters.index(c) for c in part] for part in parts])
        optimizer.zero_grad()
        out, state = model.recurrence(model.embedding(ids[:, :-1]), state)
        told = model.head(out).log_softmax(-1).gather(-1, ids[:, 1:, None])
        (-told.mean()).backward()
        optimizer.step()
        state = state.detach() if isinstance(state, Tensor) else tuple(s.detach() for s in state)
        losses.append(-told.mean().item())
        position += length
    return losses


@pytest.mark.parametrize("contender", [RNN, LSTM], ids=lambda c: c.name)
def test_training_is_that_of_a_plain_loop(contender: Contender) -> None:
    windows = training.training_windows(TEXT, 6, 100, "cpu")
    assert len(windows) == 5
    model, optimizer = built(contender, small(), len(TEXT.characters), seed=0)
    blocks = list(training.train_(model, optimizer, windows, 20))
    losses = [loss for block in blocks for loss in block.losses]
    assert losses == pytest.approx(plain_losses(contender, 100, 6, 20), rel=1e-4)
    assert [len(block.losses) for block in blocks] == [1, 16, 3]
    assert sum(block.timed for block in blocks) == 19
    assert blocks[0].seconds == 0 < blocks[1].seconds


def test_training_ends_after_a_loss_that_is_not_finite() -> None:
    model, optimizer = built(replace(RNN, rate=1e30), small(), len(TEXT.characters), seed=0)
    windows = training.training_windows(TEXT, 4, 8, "cpu")
    losses = [loss for s in training.train_(model, optimizer, windows, 40) for loss in s.losses]
    assert len(losses) < 40
    assert [math.isfinite(loss) for loss in losses] == [True] * (len(losses) - 1) + [False]


# The measures


def test_bits_are_those_of_a_loop_over_single_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "CHUNK", 7)
    model = made(RNN).double()
    rows = training.streams(TEXT.held_out, TEXT.characters, SEQUENCES)
    w = {name: tensor.detach() for name, tensor in model.named_parameters()}
    bits = []
    for row in rows.tolist():
        h = torch.zeros(6, dtype=torch.float64)
        for character, following in pairwise(row):
            x = w["embedding.weight"][character]
            sums = w["recurrence.weight_ih_l0"] @ x + w["recurrence.bias_ih_l0"]
            h = torch.tanh(sums + w["recurrence.weight_hh_l0"] @ h + w["recurrence.bias_hh_l0"])
            scores = w["head.weight"] @ h + w["head.bias"]
            share = float((scores[following] - scores.logsumexp(0)).exp())
            bits.append(-math.log2(share))
    found = training.bits_per_character(model, rows)
    assert found == pytest.approx(statistics.fmean(bits), rel=1e-10)
    assert Run(RNN, 0, bits=found).perplexity == pytest.approx(2 ** statistics.fmean(bits))


def test_a_model_that_knows_nothing_needs_the_bits_of_the_alphabet() -> None:
    model = made(LSTM)
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    rows = training.streams(TEXT.held_out, TEXT.characters, SEQUENCES)
    expected = math.log2(len(TEXT.characters))
    assert training.bits_per_character(model, rows) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("contender", CONTENDERS, ids=lambda c: c.name)
def test_retention_is_that_of_the_probe_behind_the_warm_up(contender: Contender) -> None:
    model = made(contender)
    rows = training.streams(TEXT.held_out, TEXT.characters, SEQUENCES)
    found = training.retained(model, rows, 8, 12, seed=5)
    state: Any = None
    for step in range(8):
        _, state = model.recurrence(model.embedding(rows[:, step : step + 1]), state)
    x = model.embedding(rows[:, 8:20])
    expected = rnnguard.probe.retention(model.recurrence, x, state=state, seed=5)
    assert found.log10 == pytest.approx(expected.log10, abs=1e-4)
    assert len(found.log10) == 13


def test_retention_of_a_linear_recurrence_is_known() -> None:
    model = made(RNN)
    with torch.no_grad():
        for name, parameter in model.recurrence.named_parameters():
            parameter.copy_(0.5 * torch.eye(6) if name == "weight_hh_l0" else 0 * parameter)
    rows = training.streams(TEXT.held_out, TEXT.characters, SEQUENCES)
    curve = training.retained(model, rows, 8, 12, seed=0).log10
    # Without input the state stays 0, where tanh is the identity: R(k) = 0.5^k.
    assert curve == pytest.approx([k * math.log10(0.5) for k in range(13)], abs=1e-4)
    assert Run(RNN, 0, before=curve, after=curve[:5]).lengths == (6, 4)


def test_the_effective_length_ends_where_the_gradient_first_falls_short() -> None:
    assert Run(RNN, 0, before=[0, -1, -1.9, -2.1, -0.5]).lengths == (2, None)


def spikes_by_hand(norms: list[float], losses: list[float]) -> list[int]:
    found = []
    for step, (norm, loss) in enumerate(zip(norms, losses, strict=True)):
        if not (math.isfinite(norm) and math.isfinite(loss)):
            found.append(step)
            continue
        until = max(sum(map(math.isfinite, norms[:step])), 5)
        recent = [n for n in norms if math.isfinite(n)][max(0, until - 200) : until]
        if norm > max(10 * statistics.median(recent), 1.0):
            found.append(step)
    return found


def test_spikes_are_counted_by_the_rule() -> None:
    norms = [0.05 + 0.001 * (i % 7) for i in range(600)]
    losses = [1.0] * 600
    norms[20], norms[21] = 0.9, 1.1  # many times the median, but only one above the clip's 1
    norms[300:] = [2 * n + 0.1 * (i // 100) for i, n in enumerate(norms[300:])]
    norms[450], norms[451] = 0.99, 3.0
    norms[500], losses[510] = math.inf, math.nan
    run = Run(RNN, 0, losses=losses, norms=norms)
    assert list(run.spikes) == spikes_by_hand(norms, losses) == [21, 451, 500, 510]
    assert run.spikes_per_epoch(150) == 1.0
    assert Run(LN_LSTM, 0, losses=losses, norms=norms).spikes == run.spikes


# The whole


@pytest.fixture(scope="module")
def outcome() -> Outcome:
    return story.measured(small(seeds=2, steps=20), TEXT)


def test_every_model_and_seed_is_measured(outcome: Outcome) -> None:
    assert [(r.contender.name, r.seed) for r in outcome.runs] == [
        (contender.name, seed) for seed in (0, 1) for contender in CONTENDERS
    ]
    for run in outcome.runs:
        assert len(run.losses) == len(run.norms) == 20
        assert run.characters == 19 * 4 * 8
        assert run.seconds > 0 and run.stopped is None
        assert run.bits is not None and run.bits < math.log2(len(TEXT.characters))
        assert run.before is not None and run.after is not None
        assert len(run.before) == len(run.after) == outcome.window + 1
        assert run.before != run.after
    assert outcome.per_epoch == (len(TEXT.training) // 4 - 1) // 8


def test_one_seed_gives_one_outcome_and_no_trace(outcome: Outcome) -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    again = story.measured(small(seed=1, steps=20), TEXT)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    first, second = outcome.runs[:4], outcome.runs[4:]
    for run, same, other in zip(again.runs, second, first, strict=True):
        assert run.losses == same.losses != other.losses
        assert (run.norms, run.bits, run.after) == (same.norms, same.bits, same.after)


def test_epochs_are_passes_over_the_text() -> None:
    asked = small(steps=None, epochs=1.5)
    assert asked.steps is None
    assert [asked.steps_for(n) for n in (1, 100)] == [2, 150]
    found = story.measured(replace(asked, contenders=(RNN,), epochs=0.1), TEXT)
    assert found.steps == len(found.runs[0].losses) == round(0.1 * found.per_epoch)


def columns_of(shown: str, label: str) -> tuple[list[str], list[str]]:
    """The words of a model's line in the table, and of the line below it."""
    lines = shown.splitlines()
    number = next(i for i, line in enumerate(lines) if line.startswith(f"{label}  "))
    return lines[number].split(), lines[number + 1].split()


def test_the_table_shows_medians_and_ends_in_80_columns(outcome: Outcome) -> None:
    shown = plain(outcome)
    assert max(map(len, shown.splitlines())) <= 80
    for contender in CONTENDERS:
        one, two = outcome.of(contender)
        assert one.bits is not None and two.bits is not None
        middle, ends = columns_of(shown, contender.label)
        low, high = sorted([one.bits, two.bits])
        assert f"{(low + high) / 2:.3f}" in middle and f"{low:.3f}-{high:.3f}" in ends
        assert f"rate {contender.rate:g}" in shown
    for word in ("T_eff(1e-2)", f"over {outcome.window} steps", "seeds 0-1", "nats", "seed 100"):
        assert word in " ".join(shown.split())


def test_lengths_that_reach_the_end_are_lower_bounds(outcome: Outcome) -> None:
    window = outcome.window
    run = Run(RNN, 0, before=[0.0] * (window + 1), after=[0.0, -1.0] + [-3.0] * (window - 1))
    middle, _ = columns_of(plain(replace(outcome, runs=[run])), "tanh RNN")
    assert middle[2:5] == [f"{window}+", "->", "1"]


def test_an_exploding_gradient_is_no_long_memory(outcome: Outcome) -> None:
    run = Run(INDRNN, 2, before=[0.0, 1.9, 0.0], after=[0.0, 1.9, 3.3])
    said = plain(replace(outcome, runs=[run]))
    assert "IndRNN, seed 2: after training the gradient explodes, up to 2e+03" in said
    assert said.count("explodes") == 1


def points(line: Any) -> tuple[list[float], list[float]]:
    return list(line.get_xdata()), list(line.get_ydata())


def test_the_figure_draws_what_was_measured(outcome: Outcome) -> None:
    pytest.importorskip("matplotlib")
    by_lag, by_epoch = figure.drawn(outcome).axes
    curves = [points(line)[1] for line in by_lag.lines]
    for run in outcome.runs:
        assert run.before is not None and run.after is not None
        assert list(run.before) in curves and list(run.after) in curves
    for axes in (by_lag, by_epoch):
        legend: Any = axes.get_legend()
        assert [text.get_text() for text in legend.get_texts()] == [c.label for c in CONTENDERS]
    epochs, bits = points(by_epoch.lines[0])
    assert bits == pytest.approx([loss / math.log(2) for loss in outcome.runs[0].losses])
    assert epochs == pytest.approx([(i + 0.5) / outcome.per_epoch for i in range(20)])
    assert points(by_epoch.lines[1]) == ([20 / outcome.per_epoch], [outcome.runs[0].bits])


# The command


def test_the_command_writes_table_figure_and_data(
    text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--json", "b.json"]
    files += ["--plot", "b.svg"] if find_spec("matplotlib") else []
    assert main(["bench", "words.txt", *SMALL, *files]) == 0
    said = capsys.readouterr()
    assert said.err == "" and "\x1b" not in said.out
    data = json.loads(Path("b.json").read_text())
    assert [model["name"] for model in data["models"]] == [c.name for c in CONTENDERS]
    for model, contender in zip(data["models"], CONTENDERS, strict=True):
        (found,) = model["runs"]
        middle, _ = columns_of(said.out, contender.label)
        assert f"{found['bits_per_character']:.3f}" in middle
        assert f"{2 ** found['bits_per_character']:.2f}" in middle
        assert len(found["losses_in_nats_per_character"]) == 3
        assert found["effective_length_after"] <= data["conditions"]["measured_steps"]
    if len(files) > 2:
        assert Path("b.svg").read_text().count("<svg") == 1


def test_models_and_rates_can_be_chosen(
    text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = ["--models", "lstm,rnn", "--rate", "0.5", "--rate", "lstm=0.25", "--seed", "7"]
    assert main(["bench", "words.txt", *SMALL, *chosen]) == 0
    said = capsys.readouterr().out
    assert "IndRNN" not in said and "seed 7" in said and "seed 100" not in said
    assert re.search(r"tanh RNN: .*rate 0\.5,", said) and re.search(r"LSTM: .*rate 0\.25,", said)


def test_quick_is_smaller_and_what_is_said_stays() -> None:
    quick = conditions(quick=True, hidden=99)
    assert (quick.steps, quick.hidden, quick.length) == (60, 99, 32)
    assert conditions(quick=True, epochs=2).steps is None


def cut_short(monkeypatch: pytest.MonkeyPatch, number: int, blocks: int) -> None:
    """Ctrl-C in the training of the model with this number, after so many blocks of steps."""
    whole, begun = training.train_, []

    def train_(*arguments: Any) -> Iterator[training.Steps]:
        begun.append(1)
        for place, steps in enumerate(whole(*arguments)):
            if len(begun) == number and place == blocks:
                raise KeyboardInterrupt
            yield steps

    monkeypatch.setattr(story, "train_", train_)


def test_an_interrupt_gives_what_there_is(
    text_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cut_short(monkeypatch, 2, 1)
    assert main(["bench", "words.txt", *SMALL, "--json", "b.json"]) == 130
    said = capsys.readouterr().out
    assert "Interrupted; this is what there is so far." in said
    assert "LSTM, seed 0: interrupted after 1 step." in said
    whole, part, nothing = (columns_of(said, name)[0] for name in ("tanh RNN", "LSTM", "IndRNN"))
    assert whole.count("-") == 0 and nothing.count("-") == 7
    assert part[1].isdigit() and part[2:6] == ["->", "-", "-", "-"]
    data = json.loads(Path("b.json").read_text())
    runs = [model["runs"] for model in data["models"]]
    assert data["interrupted"] is True and [len(each) for each in runs] == [1, 1, 0, 0]
    assert runs[0][0]["stopped"] is None and runs[1][0]["stopped"] == "interrupted"
    assert runs[1][0]["effective_length_before"] is not None
    assert runs[1][0]["bits_per_character"] is None
    assert len(runs[1][0]["losses_in_nats_per_character"]) == 1


def test_an_interrupt_before_anything_is_130_too(
    text_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(story, "run", interrupted)
    assert main(["bench", "words.txt", *SMALL]) == 130
    assert capsys.readouterr().err == "Interrupted.\n"


def test_a_model_that_diverges_is_told(text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wild = ["--models", "rnn,lstm", "--rate", "rnn=1e30", "--steps", "30", "--json", "b.json"]
    assert main(["bench", "words.txt", *SMALL[:6], *wild]) == 0
    assert re.search(r"tanh RNN, seed 0: diverged after \d+ steps\.", capsys.readouterr().out)
    model, other = json.loads(Path("b.json").read_text())["models"]
    (run,) = model["runs"]
    assert run["stopped"] == "diverged" and run["bits_per_character"] is None
    assert run["spikes"] and run["losses_in_nats_per_character"][-1] is None
    assert other["runs"][0]["stopped"] is None


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere.txt"], "`nowhere.txt`: there is no such file. Check the path. (RG920)"),
        (["."], "`.`: it is a folder. Name a text file. (RG920)"),
        (["empty.txt"], "`empty.txt`: it is empty. Name a text file. (RG920)"),
        (
            ["short.txt"],
            "`short.txt`: it has 30 characters, where 10320 are needed. Name a longer text, or "
            "give a smaller --length or --batch. (RG920)",
        ),
        (
            ["binary"],
            "`binary`: it is not text: byte 3 is 0. Name a text file, in UTF-8: "
            "`iconv -t utf-8` converts one. (RG920)",
        ),
        (
            ["latin.txt"],
            "`latin.txt`: it is not text in UTF-8, from byte 2 on. Name a text file, in UTF-8: "
            "`iconv -t utf-8` converts one. (RG920)",
        ),
        (
            ["--models", "rnn,lsmt"],
            "`--models`: there is no model 'lsmt'; did you mean 'lstm'? (RG914)",
        ),
        (
            ["--rate", "fast", "--rate", "gru=1", "--steps", "3", "--epochs", "2"],
            "`--rate`: 'fast' is no learning rate. Write a number above 0, as in `0.003` or "
            "`lstm=0.003`. (RG920)\n"
            "`--rate`: there is no model 'gru'; known: 'indrnn', 'ln-lstm', 'lstm', 'rnn'. "
            "(RG914)\n"
            "`--epochs`: it says the same as --steps in another way. Give one of the two. (RG920)",
        ),
        (["--epochs", "0"], "`--epochs`: it is 0. Give a number above 0. (RG920)"),
        (
            ["--plot", "b.gif"],
            "`--plot`: `b.gif` is neither PNG nor SVG. Give a name that ends in .png or .svg. "
            "(RG920)",
        ),
        (
            ["--json", "no/b.json"],
            "`--json`: there is no folder `no`. Make it first, or name another. (RG920)",
        ),
    ],
)
def test_what_cannot_be_meant_is_two_and_a_sentence(
    arguments: list[str], sentence: str, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty.txt").write_text(" \n")
    Path("short.txt").write_text("abc" * 10)
    Path("binary").write_bytes(b"abc\0def")
    Path("latin.txt").write_bytes("Grüße".encode("latin-1"))
    assert main(["bench", *arguments]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", f"{sentence}\n")


def test_a_wrong_device_is_named(text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "words.txt", *SMALL, "--device", "nonsense"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("`device`: ") and said.endswith("(RG912)\n")


def test_a_missing_matplotlib_is_named_before_training(
    text_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(figure, "find_spec", lambda name: None)
    monkeypatch.setattr(story, "measured", None)
    assert main(["bench", "words.txt", *SMALL, "--plot", "b.png"]) == 2
    sentence = "matplotlib is not installed. Run `pip install rnnguard[plot]`. (RG918)"
    assert capsys.readouterr().err == f"`--plot`: {sentence}\n"


def test_a_text_of_one_character_is_no_crash() -> None:
    outcome = story.measured(small(), Text.of("one", "a" * 2000))
    assert [run.bits for run in outcome.runs] == [0.0] * 4
    assert [run.spikes for run in outcome.runs] == [()] * 4


def test_help_and_errors_come_without_torch(fresh_python: Callable[..., str]) -> None:
    code = (
        "import sys; from rnnguard.cli import main; codes = [main(['bench', '--help'])];"
        "heavy = [m for m in ('torch', 'rich', 'numpy', 'jinja2') if m in sys.modules];"
        "codes.append(main(['bench', 'nowhere.txt'])); print(codes, heavy, 'torch' in sys.modules)"
    )
    said = fresh_python("-c", code)
    assert said.endswith("[0, 2] [] False\n")
    assert "--seeds" in said
