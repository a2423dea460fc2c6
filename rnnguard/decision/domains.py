"""Which values a reading can have, and which readings cannot come together.

Without them a table would seem to have gaps where nothing can ever fall.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

from rnnguard.decision.conditions import VOCABULARY, Interval, OneOf, parse_cell
from rnnguard.decision.diagnosis import FADED, GROWTH_LIMIT, RISKY_SPIKES, VANISHED
from rnnguard.measurements import RunReadings, SiteReadings

NOT_TAKEN: Final = "not taken"
TAKEN: Final = "taken"
# What a row, or a fact, allows of a reading.
States = Interval | OneOf | Literal["taken", "not taken"]

SHARES = frozenset(
    {"saturation", "dead_units", "padded", "dropout", "lag_concentration", "forget_gate",
     "leakage", "spike_rate", "clip_fraction", "skip_rate"}
)  # fmt: skip
NEVER_NEGATIVE = frozenset(
    {"decay_per_step", "growth", "spectral_radius", "input_rms", "input_drive", "output_rms",
     "grad_norm", "grad_norm_spread", "learning_rate", "weight_decay", "seconds", "layer_ratio",
     "reach_share"}
)  # fmt: skip


@dataclass(frozen=True)
class Domain:
    """The values of one reading: labels, or numbers from `low` to `high`, whole or not."""

    labels: tuple[str | bool, ...] | None
    low: float
    high: float
    whole: bool
    optional: bool


def domain_of(name: str) -> Domain:
    """The domain of a reading that rules may name."""
    record = SiteReadings if name in SiteReadings.model_fields else RunReadings
    annotation = record.model_fields[name].annotation
    whole = annotation is int or int in get_args(annotation)
    kind = VOCABULARY[name]
    labels = None if kind is float else (False, True) if kind is bool else tuple(kind)
    return Domain(
        labels=labels,
        low=0.0 if whole or name in SHARES | NEVER_NEGATIVE else -float("inf"),
        high=1.0 if name in SHARES else float("inf"),
        whole=whole,
        optional=type(None) in get_args(annotation),
    )


def _states(name: str, stated: Any) -> States:
    if stated in (TAKEN, NOT_TAKEN) and not isinstance(stated, list):
        found: States = stated
        return found
    return parse_cell(name, stated)


_AT_MEMORY = ["truncated", "vanishing", "at risk: fading", "healthy"]
_CALM = [*_AT_MEMORY, "unknown"]
_UNGATED = ["rnn_tanh", "rnn_relu"]

# Each table holds of no measurement, for the reason above it.
_FACTS: tuple[dict[str, Any], ...] = (
    # These levels are judged by the retention at the memory needed.
    {"level": _AT_MEMORY, "memory_needed": NOT_TAKEN},
    {"level": _AT_MEMORY, "retention_at_memory": NOT_TAKEN},
    {"level": "healthy", "retention_at_memory": f"< {FADED}"},
    {"level": "vanishing", "retention_at_memory": f">= {VANISHED}"},
    # What grows, spikes or is not finite has a level of its own.
    {"level": _CALM, "growth": f"> {GROWTH_LIMIT}"},
    {"level": _CALM, "nonfinite": True},
    {"level": _CALM, "nonfinite_steps": "> 0"},
    {"level": _CALM, "spike_rate": f">= {RISKY_SPIKES}"},
    # A mere bound on the memory, or a path around, is at most a risk.
    {"level": ["vanishing", "truncated"], "memory_source": ["assumed", "unknown"]},
    {"level": ["vanishing", "truncated"], "bypass": True},
    {"level": ["vanishing", "truncated"], "readout": "pooled"},
    # The source says whether the memory is known, and only data tell at which lags it lies.
    {"memory_source": "unknown", "memory_needed": TAKEN},
    {"memory_source": ["declared", "estimated", "assumed"], "memory_needed": NOT_TAKEN},
    {"memory_source": ["assumed", "unknown"], "lag_concentration": TAKEN},
    {"memory_needed": NOT_TAKEN, "lag_concentration": TAKEN},
    # What only some cells have.
    {"cell": ["lstm", "gru"], "keep_gate": False},
    {"cell": _UNGATED, "keep_gate": True},
    {"cell": [*_UNGATED, "custom"], "forget_bias": TAKEN},
    {"cell": [*_UNGATED, "custom"], "forget_gate": TAKEN},
    {"cell": ["rnn_tanh", "lstm", "gru", "custom"], "dead_units": TAKEN},
    {"cell": "rnn_relu", "dead_units": NOT_TAKEN},
    {"cell": [*_UNGATED, "gru", "custom"], "proj_size": "> 0"},
    # Nothing is read inside a hand-written recurrence.
    *(
        {"cell": "custom", name: TAKEN}
        for name in ("saturation", "input_rms", "input_drive", "output_rms", "spectral_radius",
                     "layer_ratio")
    ),
    # What only a trial shows.
    *(
        {"trial_steps": 0, name: TAKEN}
        for name in ("spike_rate", "clip_fraction", "skip_rate", "improved", "nonfinite_steps")
    ),
)  # fmt: skip
IMPOSSIBLE: tuple[dict[str, States], ...] = tuple(
    {name: _states(name, stated) for name, stated in fact.items()} for fact in _FACTS
)
