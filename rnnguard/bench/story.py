"""The benchmark from its start to what is shown, also where Ctrl-C ends it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress, TaskID
from torch import Tensor

from rnnguard.answers import STOPPED
from rnnguard.bench import figure
from rnnguard.bench.conditions import Conditions
from rnnguard.bench.models import CharacterModel, built, weights_of
from rnnguard.bench.outcome import Outcome, Run
from rnnguard.bench.table import show
from rnnguard.bench.text import SEQUENCES, Text
from rnnguard.bench.training import (
    Windows,
    bits_per_character,
    retained,
    streams,
    train_,
    training_windows,
)
from rnnguard.demo import one_thread
from rnnguard.errors import Refusal, refuse
from rnnguard.files import write_text
from rnnguard.probe.standalone import place_of


def run(
    conditions: Conditions, text: Text, plot: Path | None = None, data: Path | None = None
) -> int:
    """Trains and measures every model, shows what came of it, and gives the exit code.

    plot, data: files for the figure and for everything as JSON. All that can be refused is
    refused before anything is trained.
    """
    text.check_length(conditions)
    place_of(conditions.device)
    refuse([*_nowhere("--plot", plot), *_nowhere("--json", data)])
    if plot is not None:
        figure.check_possible(plot)
    outcome = measured(conditions, text)
    show(outcome)
    if data is not None:
        write_text(data, json.dumps(outcome.to_dict(), indent=1, allow_nan=False) + "\n")
    if plot is not None:
        figure.write(outcome, plot)
    return STOPPED if outcome.interrupted else 0


def _nowhere(option: str, path: Path | None) -> Sequence[Refusal]:
    if path is None or path.resolve().parent.is_dir():
        return []
    fact = f"there is no folder `{path.parent}`."
    return [Refusal("RG920", option, fact, "Make it first, or name another.")]


@one_thread()
def measured(conditions: Conditions, text: Text) -> Outcome:
    """What came of every model and seed, or of those until Ctrl-C."""
    begun = time.perf_counter()
    windows = training_windows(text, conditions.batch, conditions.length, conditions.device)
    rows = streams(text.held_out, text.characters, SEQUENCES).to(conditions.device)
    outcome = Outcome(
        conditions=conditions,
        text=text,
        steps=conditions.steps_for(len(windows)),
        per_epoch=len(windows),
        window=text.window(conditions),
    )
    try:
        _train_all_(outcome, windows, rows)
    except KeyboardInterrupt:
        outcome.interrupted = True
        for run in outcome.runs[-1:]:
            if run.after is None and run.stopped is None:
                run.stopped = "interrupted"
    outcome.seconds = time.perf_counter() - begun
    return outcome


def _train_all_(outcome: Outcome, windows: Windows, rows: Tensor) -> None:
    conditions, console = outcome.conditions, Console(stderr=True)
    # One seed of all models before the next, so that what Ctrl-C leaves can be compared.
    planned = [(c, seed) for seed in conditions.seeds for c in conditions.contenders]
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=outcome.steps * len(planned))
        for number, (contender, seed) in enumerate(planned):
            words = f"{contender.label}, seed {seed}"
            progress.update(task, description=words, completed=outcome.steps * number)
            run = Run(contender, seed)
            outcome.runs.append(run)
            _train_and_measure_(run, outcome, windows, rows, progress, task)


def _train_and_measure_(
    run: Run, outcome: Outcome, windows: Windows, rows: Tensor, progress: Progress, task: TaskID
) -> None:
    """Fills the record bit by bit, so that it holds what there is at any time."""
    c, characters = outcome.conditions, len(outcome.text.characters)
    model, optimizer = built(run.contender, c, characters, run.seed)
    run.weights = weights_of(model)
    run.before = retained(model, rows, c.length, outcome.window, run.seed).log10
    for steps in train_(model, optimizer, windows, outcome.steps):
        run.losses += steps.losses
        run.norms += steps.norms
        run.characters += steps.timed * c.batch * c.length
        run.seconds += steps.seconds
        progress.advance(task, len(steps.losses))
    if not _is_finite(model):
        run.stopped = "diverged"
        return
    run.bits = bits_per_character(model, rows)
    run.after = retained(model, rows, c.length, outcome.window, run.seed).log10


def _is_finite(model: CharacterModel) -> bool:
    return all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())
