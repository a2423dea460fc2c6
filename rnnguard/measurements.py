"""What inspection and probe found out: sites and their readings, as frozen records; no torch.

Every scalar field of `SiteReadings` and `RunReadings` is a word that rule files may use.
"""

from __future__ import annotations

from typing import Literal

from rnnguard.records import (
    LEVELS,
    Basis,
    Cell,
    Direction,
    Form,
    Level,
    MemorySource,
    OptimizerKind,
    Readout,
    Record,
    near_miss,
)
from rnnguard.usage import RunUsage, SiteUsage


class Site(Record):
    """One recurrence of the model with all paths that lead to it.

    `form` is "fused" for torch's modules, "cell" for torch's cells in a loop, and "written"
    for a recurrence that the user spelled out, whose cell is "custom": its recurrent weights
    are named in `weights`, and its hidden size counts all that is carried.
    `bypass`: the output sees several steps of the input, or each step states of the past,
    without the recurrence. `padded`:
    share of the steps that are padding; `picked`: each sequence is read out at an end of its
    own. `remade`: its weights are made anew in each forward, as by weight drop.
    """

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
    weights: tuple[str, ...] = ()
    bypass: bool = False
    padded: float = 0.0
    picked: bool = False
    remade: bool = False

    @property
    def label(self) -> str:
        """The path as people read it; the model itself has no path."""
        return self.path or "(model)"


class Exponent(Record):
    """A Lyapunov exponent in nats per step, with its standard error.

    `freedom` is the degrees of freedom of that error: one less than the number of sequences,
    or of blocks of time where there was one sequence; None where only the error is known. 0
    where there was nothing to compare, and then the error stands at 0 and the interval is
    unbounded.
    """

    value: float
    stderr: float
    freedom: int | None = None

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval, by Student's t; the normal one where no freedom is known."""
        from scipy.special import ndtri, stdtrit

        if self.freedom == 0:
            return -float("inf"), float("inf")
        quantile = ndtri(0.975) if self.freedom is None else stdtrit(self.freedom, 0.975)
        reach = self.stderr * float(quantile)
        return self.value - reach, self.value + reach


class LayerReadings(Record):
    """What was measured of one layer in one direction.

    `retention` is log10 R(k) for lag k = 0, 1, ..., `retention_stderr` its standard error.
    """

    layer: int
    direction: Direction
    exponents: tuple[Exponent, ...]
    retention: tuple[float, ...]
    retention_stderr: tuple[float, ...] = ()
    growth: float
    spectral_radius: float
    forget_gate: float | None
    saturation: float
    dead_units: float | None
    output_rms: float


class Provenance(Record):
    """Whether weights are trained and what tells so; what is unsure counts as trained."""

    verdict: Literal["untrained", "trained", "unsure"]
    reason: str

    @property
    def trained(self) -> bool:
        return self.verdict != "untrained"

    def __str__(self) -> str:
        doubt = "not sure to be untrained" if self.verdict == "unsure" else self.verdict
        return f"the weights are {doubt}: {self.reason}"


class SiteReadings(SiteUsage):
    """Everything measured at one site.

    `retention` is log10 R(k) for lag k = 0, 1, ..., `retention_stderr` its standard error;
    `growth` is max R(k); `decay_per_step` is exp of the leading exponent;
    `effective_length` is T_eff(1e-2) in steps; every `..._interval` holds 95 % bounds,
    None where they were not measured; `growth_over_window` is that exponent times the window;
    `lag_concentration` is the share of the memory needed that already gives half of what
    the data tell, 1 when all of it lies at the longest lag. `carried_over`: the state goes on
    from batch to batch, the gradient does not. `forward_reach`: how many steps ago an input may
    lie and still be read out of the state by a line, which needs no gradient. `provenance`: why
    the weights count as `trained` or not. What is read
    inside torch's own cells is None at a hand-written site, which has no `layer_readings` either.
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
    bypass: bool = False
    padded: float = 0.0
    picked: bool = False
    remade: bool = False
    carried_over: bool = False

    exponents: tuple[Exponent, ...]
    retention: tuple[float, ...]
    retention_stderr: tuple[float, ...] = ()
    layer_readings: tuple[LayerReadings, ...]

    decay_per_step: float
    expansive: bool
    growth: float
    growth_over_window: float
    effective_length: int
    effective_length_interval: tuple[int, int] | None = None
    memory_needed: int | None
    memory_needed_interval: tuple[int, int] | None = None
    forward_reach: int | None = None
    memory_source: MemorySource
    lag_concentration: float | None
    retention_at_memory: float | None
    retention_at_memory_interval: tuple[float, float] | None = None
    spectral_radius: float | None
    whole_matrix_orthogonal: bool
    forget_gate: float | None
    forget_bias: float | None
    forget_bias_doubled: bool
    saturation: float | None
    dead_units: float | None
    input_rms: float | None
    input_drive: float | None
    output_rms: float | None
    silent_input: bool
    trained: bool
    provenance: Provenance | None = None
    keep_gate: bool
    layer_ratio: float | None = None
    entries: tuple[str, ...] = ()
    gates: tuple[str, ...] = ()
    level: Level = "unknown"

    @property
    def label(self) -> str:
        return self.path or "(model)"


class RunReadings(RunUsage):
    """What was measured of the run as a whole: data, gradients, optimizer, and trial steps.

    Of a trial: `spike_rate`, `clip_fraction` and `skip_rate` are shares of its steps,
    `update_ratio` is log10 of |change| / |weight| of the recurrent weights per step,
    `loss_change` the loss at its end minus that at its start, `loss_rise` the loss at its end
    minus that of the untouched model, as a share of that and 0 within its error, `improved`
    whether it fell clearly, `graph_kept` whether a step failed because a state kept the graph of
    the last one. `weight_decay` is the largest on a bias of the recurrences.
    """

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
    trial_steps: int = 0
    spike_rate: float | None = None
    clip_fraction: float | None = None
    skip_rate: float | None = None
    update_ratio: float | None = None
    loss_change: float | None = None
    loss_above_start: float | None = None
    loss_rise: float | None = None
    improved: bool | None = None
    nonfinite_steps: int | None = None
    first_nonfinite: str | None = None
    graph_kept: bool = False
    trial_stopped: str | None = None


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
