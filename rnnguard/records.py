"""The frozen records that travel down the flow; plain data, no torch.

Every scalar field of `SiteReadings` and `RunReadings` is a word that rule files may use.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Literal

from pydantic import BaseModel, ConfigDict

SCHEMA = 1

Cell = Literal["rnn_tanh", "rnn_relu", "lstm", "gru"]
Form = Literal["fused", "cell"]
Direction = Literal["forward", "reverse"]
Readout = Literal["last_step", "final_state", "pooled", "all_steps", "unknown"]
Level = Literal[
    "unstable",
    "exploding",
    "at risk: expansive",
    "truncated",
    "vanishing",
    "at risk: fading",
    "healthy",
    "unknown",
]
Tier = Literal["step", "values", "structure"]
Severity = Literal["error", "warning", "info"]
MemorySource = Literal["declared", "estimated", "assumed", "unknown"]
Basis = Literal["real data", "given inputs", "inferred inputs", "site alone"]
Outcome = Literal["planned", "applied", "taken back"]
OptimizerKind = Literal["sgd", "adam", "adamw", "other", "none"]
Dose = dict[str, float | int | str | bool | None]

TIERS: tuple[Tier, ...] = ("step", "values", "structure")
SEVERITIES: tuple[Severity, ...] = ("info", "warning", "error")
# Worst first, in the order of the health table.
LEVELS: tuple[Level, ...] = (
    "unstable",
    "exploding",
    "at risk: expansive",
    "truncated",
    "vanishing",
    "at risk: fading",
    "unknown",
    "healthy",
)


class Record(BaseModel):
    """A frozen record; unknown fields are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Site(Record):
    """One recurrence of the model with all paths that lead to it."""

    path: str
    aliases: tuple[str, ...] = ()
    module: str
    cell: Cell
    form: Form
    input_size: int
    hidden_size: int
    layers: int
    bidirectional: bool
    batch_first: bool
    proj_size: int
    bias: bool
    dropout: float
    steps: int
    batch: int
    window: int
    calls: int
    packed: bool
    readout: Readout
    normalized: bool
    residual: bool
    location: str | None = None

    @property
    def label(self) -> str:
        """The path as people read it; the model itself has no path."""
        return self.path or "(model)"


class Exponent(Record):
    """A Lyapunov exponent in nats per step, with its standard error over sequences."""

    value: float
    stderr: float


class LayerReadings(Record):
    """What was measured of one layer in one direction.

    `retention` is log10 R(k) for lag k = 0, 1, ...
    """

    layer: int
    direction: Direction
    exponents: tuple[Exponent, ...]
    retention: tuple[float, ...]
    growth: float
    spectral_radius: float
    forget_gate: float | None
    saturation: float
    dead_units: float | None
    output_rms: float


class SiteReadings(Record):
    """Everything measured at one site.

    `retention` is log10 R(k) for lag k = 0, 1, ...; `growth` is max R(k);
    `decay_per_step` is exp of the leading exponent; `effective_length` is
    T_eff(1e-2) in steps; `growth_over_window` is that exponent times the window;
    `lag_concentration` is the share of the memory needed that already gives half of what
    the data tell, 1 when all of it lies at the longest lag.
    """

    path: str
    location: str | None
    cell: Cell
    bidirectional: bool
    layers: int
    hidden_size: int
    proj_size: int
    bias: bool
    dropout: float
    steps: int
    window: int
    batch: int
    packed: bool
    readout: Readout
    normalized: bool
    residual: bool

    exponents: tuple[Exponent, ...]
    retention: tuple[float, ...]
    layer_readings: tuple[LayerReadings, ...]

    decay_per_step: float
    expansive: bool
    growth: float
    growth_over_window: float
    effective_length: int
    memory_needed: int | None
    memory_source: MemorySource
    lag_concentration: float | None
    retention_at_memory: float | None
    spectral_radius: float
    whole_matrix_orthogonal: bool
    forget_gate: float | None
    forget_bias: float | None
    forget_bias_doubled: bool
    saturation: float
    dead_units: float | None
    input_rms: float
    input_drive: float
    output_rms: float
    silent_input: bool
    trained: bool
    level: Level = "unknown"

    @property
    def label(self) -> str:
        return self.path or "(model)"


class RunReadings(Record):
    """What was measured of the run as a whole: data, gradients, optimizer."""

    basis: Basis
    source: Literal["recorded"] = "recorded"
    batches: int
    loss: float | None
    grad_norm: float
    grad_norm_spread: float
    nonfinite: bool
    precision: Literal["fp64", "fp32", "bf16", "fp16"]
    device: str
    optimizer: OptimizerKind
    learning_rate: float | None
    weight_decay: float
    amsgrad: bool
    guarded: bool
    scheduled: bool
    parameters_missing: int
    batches_per_epoch: int | None
    total_steps: int | None
    seed: int
    seconds: float
    torch: str


class Measurement(Record):
    """One look at the whole model: `measurement["encoder.lstm"]` gives a site's readings."""

    run: RunReadings
    sites: tuple[SiteReadings, ...]

    def __getitem__(self, path: str) -> SiteReadings:
        for site in self.sites:
            if site.path == path:
                return site
        known = [site.path for site in self.sites]
        raise KeyError(f"{path!r} is not a site; {near_miss(path, known)}")

    def __contains__(self, path: object) -> bool:
        return any(site.path == path for site in self.sites)

    @property
    def level(self) -> Level:
        """The worst level among the sites."""
        return min((site.level for site in self.sites), key=LEVELS.index, default="unknown")


class Finding(Record):
    """A rule met by readings, with the numbers that met it and one cure."""

    code: str
    name: str
    severity: Severity
    path: str | None
    location: str | None
    message: str
    evidence: dict[str, str]
    cure: str
    fix: Tier | Literal["manual", "none"]
    refs: tuple[str, ...] = ()


class Change(Record):
    """One remedy at one place: planned, applied, or taken back after measuring again."""

    remedy: str
    path: str | None
    tier: Tier
    dose: Dose
    scenario: str
    why: str
    outcome: Outcome = "planned"
    result: str = ""


class Plan(Record):
    """The ordered changes as plain data; can be saved, read and replayed."""

    schema_version: int = SCHEMA
    changes: tuple[Change, ...] = ()

    def __iter__(self) -> Iterator[Change]:  # type: ignore[override]  # a plan is its changes
        return iter(self.changes)

    def __len__(self) -> int:
        return len(self.changes)

    def to_dict(self) -> dict[str, object]:
        return self.model_dump(mode="json")


def near_miss(name: str, known: list[str]) -> str:
    """The half sentence that helps with a wrong name: nearest known name, or all of them."""
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"known: {', '.join(repr(k) for k in sorted(known)) or 'none'}."
