"""The mutation operators: one change each to a clean setting, or None where it means nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from benchmarks.diagnosis.models import Setting

CLEAN = "clean"


@dataclass(frozen=True)
class Mutation:
    """A named change; `change(setting)` gives the mutant or None where it does not apply."""

    name: str
    change: Callable[[Setting], Setting | None]


def _gain(factor: float) -> Mutation:
    return Mutation(f"gain x{factor:g}", lambda s: replace(s, gain=factor))


def _keep(bias: float) -> Mutation:
    return Mutation(
        f"keep bias {bias:+g}", lambda s: replace(s, keep_bias=bias) if s.gated else None
    )


def _rate(factor: float) -> Mutation:
    return Mutation(f"rate x{factor:g}", lambda s: replace(s, rate=s.rate * factor))


def _doubled(s: Setting) -> Setting | None:
    return replace(s, doubled_bias=1.0) if s.gated else None


def _wrong_sign(s: Setting) -> Setting | None:
    return replace(s, wrong_sign=True) if s.start == "chrono" else None


def _default_start(s: Setting) -> Setting | None:
    return replace(s, start="default") if s.start != "default" else None


def _rectified(s: Setting) -> Setting | None:
    return replace(s, cell="relu") if s.cell == "tanh" else None


def _deeper(s: Setting) -> Setting:
    return replace(s, layers=s.layers + 2)


def _unclipped(s: Setting) -> Setting | None:
    return replace(s, clip=None, length=2.0) if s.resizable else None


def _unscaled(s: Setting) -> Setting | None:
    return None if s.embedded else replace(s, input_scale=30.0)


def _attached(s: Setting) -> Setting | None:
    return replace(s, attached=True) if s.stateful else None


def _truncated(s: Setting) -> Setting | None:
    whole = s.packed or s.bidirectional or s.stateful
    return replace(s, window=max(1, s.memory // 3)) if s.memory >= 6 and not whole else None


def _wide_window(s: Setting) -> Setting | None:
    whole = s.packed or s.bidirectional or s.stateful
    return replace(s, window=4 * s.memory) if s.memory <= 3 and not whole else None


def _half(s: Setting) -> Setting:
    return replace(s, half=True)


MUTATIONS: tuple[Mutation, ...] = (
    Mutation(CLEAN, lambda s: s),
    *map(_gain, (0.2, 0.5, 2.0, 3.0)),
    *map(_keep, (-2.0, 0.0, 1.0, 2.0)),
    Mutation("both biases +1", _doubled),
    Mutation("wrong-sign keep gate", _wrong_sign),
    Mutation("default start", _default_start),
    Mutation("relu for tanh", _rectified),
    Mutation("two more layers", _deeper),
    *map(_rate, (10.0, 100.0)),
    Mutation("twice as wide", lambda s: replace(s, hidden=2 * s.hidden)),
    Mutation("no clip", lambda s: replace(s, clip=None)),
    Mutation("no clip, twice as long", _unclipped),
    Mutation("inputs x30", _unscaled),
    Mutation("missing detach", _attached),
    Mutation("window below memory", _truncated),
    Mutation("window above memory", _wide_window),
    Mutation("fp16 without scaler", _half),
)


def mutants(setting: Setting) -> dict[str, Setting]:
    """Every mutation that applies to the setting and changes it, by name; the clean one first."""
    changed = {mutation.name: mutation.change(setting) for mutation in MUTATIONS}
    return {
        name: mutant
        for name, mutant in changed.items()
        if mutant is not None and (name == CLEAN or mutant != setting)
    }
