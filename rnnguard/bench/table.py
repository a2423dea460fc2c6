"""The terminal view of a benchmark, readable at 80 columns, and what its figures mean."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

import rnnguard
from rnnguard.answers import print_out
from rnnguard.bench.conditions import CLIP, CONTENDERS, RATES_TRIED, Contender
from rnnguard.bench.outcome import Outcome, Run, middle_and_ends
from rnnguard.bench.text import SEQUENCES
from rnnguard.report.figure import EXPLODING
from rnnguard.report.words import counted, power

WIDTH = 80


def show(outcome: Outcome) -> None:
    """Prints the view; colour and the width of the window are a terminal's only."""
    console = Console(file=sys.stdout)
    if console.is_terminal:
        console.print(*view(outcome), sep="\n")
    else:
        print_out(plain(outcome))


def plain(outcome: Outcome) -> str:
    """The view as text of 80 columns without colour."""
    console = Console(width=WIDTH, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(*view(outcome), sep="\n")
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


def view(outcome: Outcome) -> Iterator[RenderableType]:
    """Conditions, the table, and how to read it."""
    yield from _header(outcome)
    yield Text()
    yield _table(outcome)
    yield Text()
    for contender in outcome.conditions.contenders:
        yield _bulleted(_about(outcome, contender))
    yield Text()
    for note in _notes(outcome):
        yield _bulleted(note)
    for run in outcome.runs:
        yield from (Text(words, style="bold red") for words in _warnings(run))
    if outcome.interrupted:
        yield Text("Interrupted; this is what there is so far.", style="bold red")


def _header(outcome: Outcome) -> Iterator[Text]:
    c, text = outcome.conditions, outcome.text
    seeds = f"seed {c.seeds[0]}" if len(c.seeds) == 1 else f"seeds {c.seeds[0]}-{c.seeds[-1]}"
    device = f"{c.device}, 1 thread" if torch.device(c.device).type == "cpu" else c.device
    versions = f"rnnguard {rnnguard.__version__}   torch {torch.__version__}"
    yield Text(f"{versions}   {device}   {seeds}   {outcome.seconds:.0f} s", style="bold")
    total = len(text.training) + len(text.held_out)
    yield Text(
        f"{text.name}: {total} characters, {len(text.characters)} different, "
        f"the last {len(text.held_out)} held out"
    )
    steps = f"{outcome.steps} Adam steps ({outcome.steps / outcome.per_epoch:.2g} epochs)"
    yield Text(f"each: {steps} of {c.batch} x {c.length} characters, {c.hidden} units a layer")


def _table(outcome: Outcome) -> Table:
    """Medians over the seeds, and below some the lowest and the highest."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("model")
    table.add_column("T_eff(1e-2)\nbefore -> after", justify="right", no_wrap=True)
    columns = _columns(outcome)
    for column in columns:
        table.add_column(column.head, justify="right", no_wrap=True)

    def length(steps: float) -> str:
        return f"{steps:g}+" if steps >= outcome.window else f"{steps:g}"

    for contender in outcome.conditions.contenders:
        runs = outcome.of(contender)
        ways = (_spread([run.lengths[way] for run in runs], length) for way in (0, 1))
        cells = [_stacked(*(" -> ".join(pair) for pair in zip(*ways, strict=True)))]
        for column in columns:
            middle, ends = _spread([column.read(run) for run in runs], column.form)
            cells.append(_stacked(middle, ends if column.with_ends else middle))
        table.add_row(contender.label, *cells)
    return table


@dataclass(frozen=True)
class _Column:
    """A reading in the table, and whether its lowest and highest are shown too."""

    head: str
    read: Callable[[Run], float | None]
    form: Callable[[float], str]
    with_ends: bool = False


def _columns(outcome: Outcome) -> tuple[_Column, ...]:
    def spikes(run: Run) -> float | None:
        return run.spikes_per_epoch(outcome.per_epoch)

    return (
        _Column("held-out\nbits/char", lambda run: run.bits, "{:.3f}".format, with_ends=True),
        _Column("ppl per\nchar", lambda run: run.perplexity, "{:.2f}".format),
        _Column("spikes\n/epoch", spikes, "{:.3g}".format, with_ends=True),
        _Column("median\nnorm", lambda run: run.median_norm, "{:.2g}".format),
        _Column("chars\nper s", lambda run: run.characters_per_second, _thousands),
    )


def _thousands(value: float) -> str:
    return f"{value / 1000:.3g}k"


def _spread(values: Sequence[float | None], form: Callable[[float], str]) -> tuple[str, str]:
    """The median, and from where to where they go if there are several."""
    found = middle_and_ends(values)
    if found is None:
        return "-", "-"
    middle, low, high = map(form, found)
    return middle, low if low == high else f"{low}-{high}"


def _stacked(middle: str, ends: str) -> Text:
    below = "" if ends == middle else f"\n{ends}"
    return Text(middle) + Text(below, style="dim")


def _about(outcome: Outcome, contender: Contender) -> str:
    words = [contender.made_of, counted(contender.layers, "layer")]
    words += [f"{run.weights} weights" for run in outcome.of(contender)[:1]]
    clip = "no clip" if contender.clip is None else f"clip at norm {contender.clip:g}"
    return f"{contender.label}: {', '.join([*words, f'rate {contender.rate:g}', clip])}."


def _notes(outcome: Outcome) -> Iterator[str]:
    c = outcome.conditions
    if len(c.seeds) > 1:
        yield "Medians of the seeds, which draw the weights; below them the lowest and the highest."
    yield (
        "T_eff(1e-2): steps back in time over which the state gradient keeps at least 0.01 of its "
        f"size, always (of two layers that which keeps more); over {outcome.window} steps "
        f"of {SEQUENCES} held-out sequences, behind {c.length} to warm up ({outcome.window}+: to "
        f"their end). Training looks back {c.length} steps at most."
    )
    yield "ppl: perplexity per character, 2 ^ bits; the loss in nats per character is bits x ln 2."
    yield (
        f"spike: gradient norm before the clip above both {CLIP:g} and 10 x the median of the "
        "last 200, or not finite, in any model; an epoch is one pass over the training text, "
        f"{counted(outcome.per_epoch, 'step')}."
    )
    own = {contender.name: contender.rate for contender in CONTENDERS}
    if any(contender.rate == own[contender.name] for contender in c.contenders):
        tried = ", ".join(f"{rate:g}" for rate in RATES_TRIED)
        yield (
            f"Rates are each model's best of {tried} on the built-in text at the default sizes "
            "(by held-out bits, seed 100), chosen for nothing else; --rate sets others."
        )


def _warnings(run: Run) -> Iterator[str]:
    place = f"{run.contender.label}, seed {run.seed}"
    if run.stopped is not None:
        yield f"{place}: {run.stopped} after {counted(len(run.losses), 'step')}."
    for time, curve in (("before", run.before), ("after", run.after)):
        # T_eff alone would call an exploding gradient a long memory.
        if curve is not None and max(curve) > EXPLODING:
            grown = power(max(curve))
            yield f"{place}: {time} training the gradient explodes, up to {grown} of its size."


def _bulleted(words: str) -> RenderableType:
    row = Table.grid(padding=(0, 1, 0, 0))
    row.add_row("*", Text(words))
    return row
