"""The command `rnnguard bench` and its options; no torch before it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rnnguard import options
from rnnguard.answers import STOPPED, answer

TextFile = Annotated[Path | None, typer.Argument(metavar="TEXT", show_default=False)]
Steps = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="Optimizer steps for each model; by default 800."),
]
Epochs = Annotated[
    float | None, typer.Option(metavar="X", help="Passes over the text, in place of --steps.")
]
Hidden = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Units in a layer; by default 128.")
]
Length = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Steps that the gradient goes back (the window); by default 64."
    ),
]
Batch = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Windows in a step; by default 32.")
]
Rate = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[MODEL=]X", help="Learning rate of all, or of one; by default each has its own."
    ),
]
Seeds = Annotated[int, typer.Option(min=1, metavar="N", help="How many, from --seed on.")]
Models = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="Only these of rnn, lstm, ln-lstm and indrnn."),
]
Device = Annotated[str, typer.Option(metavar="NAME", help="Where to train, such as cuda.")]
Quick = Annotated[
    bool, typer.Option("--quick", help="60 steps of 16 x 32 characters, 32 units; to try it.")
]
Plot = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Draw the curves, as .png or .svg.")
]
Data = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write everything as JSON.")
]


def bench(
    text: TextFile = None,
    steps: Steps = None,
    epochs: Epochs = None,
    hidden: Hidden = None,
    length: Length = None,
    batch: Batch = None,
    rate: Rate = None,
    seeds: Seeds = 1,
    seed: options.Seed = 0,
    models: Models = None,
    device: Device = "cpu",
    quick: Quick = False,
    plot: Plot = None,
    data: Data = None,
    debug: options.Debug = False,
) -> None:
    """Train four character models alike on a text; compare memory, bits, spikes and speed.

    TEXT is a file in UTF-8, by default the language reference that comes with Python. The models
    are a tanh RNN, an LSTM, an LSTM with LayerNorm and clip, and an IndRNN.

    Exit codes: 0 done, 2 could not start, 130 stopped by Ctrl-C, after what there was.
    """

    def work() -> int:
        from rnnguard.bench.conditions import conditions
        from rnnguard.bench.text import read_text

        asked = conditions(
            steps=steps, epochs=epochs, hidden=hidden, length=length, batch=batch,
            rates=rate or (), seeds=seeds, seed=seed, models=_split(models), device=device,
            quick=quick,
        )  # fmt: skip
        learned = read_text(text)
        learned.check_length(asked)
        from rnnguard.bench.story import run

        return run(asked, learned, plot, data)

    answer(work, debug, interrupted=STOPPED)


def _split(names: list[str] | None) -> list[str]:
    return [name.strip() for listed in names or () for name in listed.split(",") if name.strip()]
