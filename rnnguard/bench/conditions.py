"""Under which conditions the models are trained, alike for all; no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from rnnguard.errors import Refusal, refuse
from rnnguard.records import near_miss

CLIP = 1.0
"""The norm that the guard clips to; below it no step of any model counts as a spike."""
RATES_TRIED = (1e-3, 3e-3, 1e-2, 3e-2)


@dataclass(frozen=True)
class Contender:
    """A model of the benchmark: its name for --models, what it is made of, its own rate for Adam.

    One rate for all would favour whom it suits, so each has the best of `RATES_TRIED`, by bits
    per character held out of the built-in text after the default steps, with seed 100.
    """

    name: str
    label: str
    made_of: str
    rate: float
    layers: int = 1
    clip: float | None = None


CONTENDERS = (
    Contender("rnn", "tanh RNN", "nn.RNN as torch starts it", 3e-3),
    Contender("lstm", "LSTM", "nn.LSTM as torch starts it", 1e-2),
    Contender("ln-lstm", "LSTM+LN+clip", "LayerNormLSTM under rnnguard's guard", 1e-2, clip=CLIP),
    # Units of one layer never meet: they do in the next.
    Contender("indrnn", "IndRNN", "rnnguard.nn.IndRNN, ReLU, |u| <= 0.99", 1e-2, layers=2),
)


@dataclass(frozen=True)
class Conditions:
    """The same for every model; `length` are the steps of a window, `batch` windows at a time.

    steps: those asked for, None where `epochs` passes over the text were. longest: steps that the
    retention is measured over, where the held-out text has so many.
    """

    contenders: tuple[Contender, ...]
    seeds: tuple[int, ...]
    hidden: int
    length: int
    batch: int
    steps: int | None
    epochs: float | None
    device: str
    longest: int

    def steps_for(self, per_epoch: int) -> int:
        """Optimizer steps in all, where one pass over the text takes `per_epoch`."""
        if self.steps is not None:
            return self.steps
        return max(1, round((self.epochs or 0.0) * per_epoch))


@dataclass(frozen=True)
class Sizes:
    """The numbers that `--quick` makes smaller."""

    steps: int
    hidden: int
    length: int
    batch: int
    longest: int


USUAL = Sizes(steps=800, hidden=128, length=64, batch=32, longest=1000)
QUICK = Sizes(steps=60, hidden=32, length=32, batch=16, longest=200)


def conditions(
    *,
    steps: int | None = None,
    epochs: float | None = None,
    hidden: int | None = None,
    length: int | None = None,
    batch: int | None = None,
    rates: Sequence[str] = (),
    seeds: int = 1,
    seed: int = 0,
    models: Sequence[str] = (),
    device: str = "cpu",
    quick: bool = False,
) -> Conditions:
    """The conditions that were asked for, the rest as usual; what cannot be meant is refused.

    rates: `0.003` for all models, or `lstm=0.003` for one. seeds: how many, from `seed` on.
    Raises RefusedError (RG914 for a model that is not there, RG920 for a value).
    """
    sizes = QUICK if quick else USUAL
    refuse([*_wrong_models(models), *_wrong_rates(rates), *_wrong_steps(steps, epochs)])
    chosen = [contender for contender in CONTENDERS if not models or contender.name in models]
    given = dict(_rate(text) for text in rates)
    return Conditions(
        contenders=tuple(replace(c, rate=given.get(c.name, given.get("", c.rate))) for c in chosen),
        seeds=tuple(range(seed, seed + seeds)),
        hidden=hidden or sizes.hidden,
        length=length or sizes.length,
        batch=batch or sizes.batch,
        steps=None if epochs is not None else steps or sizes.steps,
        epochs=epochs,
        device=device,
        longest=sizes.longest,
    )


def _wrong_models(models: Sequence[str]) -> Iterator[Refusal]:
    known = [contender.name for contender in CONTENDERS]
    for name in models:
        if name not in known:
            fact = f"there is no model {name!r};"
            yield Refusal("RG914", "--models", fact, near_miss(name, known))


def _wrong_rates(rates: Sequence[str]) -> Iterator[Refusal]:
    known = [contender.name for contender in CONTENDERS]
    for text in rates:
        name, rate = _rate(text)
        if name and name not in known:
            fact = f"there is no model {name!r};"
            yield Refusal("RG914", "--rate", fact, near_miss(name, known))
        if not 0 < rate < float("inf"):
            cure = "Write a number above 0, as in `0.003` or `lstm=0.003`."
            yield Refusal("RG920", "--rate", f"{text!r} is no learning rate.", cure)


def _rate(text: str) -> tuple[str, float]:
    """The model, empty for all, and its rate; NaN where that is no number."""
    name, _, number = text.rpartition("=")
    try:
        return name.strip(), float(number)
    except ValueError:
        return name.strip(), float("nan")


def _wrong_steps(steps: int | None, epochs: float | None) -> Iterator[Refusal]:
    if steps is not None and epochs is not None:
        fact = "it says the same as --steps in another way."
        yield Refusal("RG920", "--epochs", fact, "Give one of the two.")
    if epochs is not None and not 0 < epochs < float("inf"):
        yield Refusal("RG920", "--epochs", f"it is {epochs:g}.", "Give a number above 0.")
