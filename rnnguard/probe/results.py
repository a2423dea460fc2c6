"""What the public measuring functions give: frozen records with errors and intervals."""

from __future__ import annotations

from collections.abc import Iterator

from rnnguard.measurements import Exponent
from rnnguard.probe.retention_curve import RetentionCurve
from rnnguard.records import Direction, Record


class Measured(Record):
    """What was measured: so many sequences of at most so many steps, and what `notes` add."""

    steps: int
    sequences: int
    notes: tuple[str, ...] = ()


class LayerExponent(Exponent):
    """An exponent in nats per step, and the layer and direction that it belongs to."""

    layer: int
    direction: Direction


class Exponents(Measured):
    """The leading exponents of a recurrence, largest first, each with error and interval.

    `entries` in nats per step; `warmup` is how many steps were left out at first.
    """

    entries: tuple[LayerExponent, ...]
    warmup: int

    def __iter__(self) -> Iterator[LayerExponent]:  # type: ignore[override]  # it is its entries
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, rank: int) -> LayerExponent:
        return self.entries[rank]

    @property
    def leading(self) -> LayerExponent:
        """The largest exponent; positive where the recurrence is expansive."""
        return self.entries[0]

    @property
    def values(self) -> tuple[float, ...]:
        """The exponents alone, in nats per step."""
        return tuple(entry.value for entry in self.entries)


class Retained(Record):
    """log10 R(k) at `lags`, with standard errors and 95 % intervals; `curve` holds every lag."""

    lags: tuple[int, ...]
    curve: RetentionCurve

    @property
    def log10(self) -> tuple[float, ...]:
        """log10 R(k) at each of `lags`; -10000 where nothing at all is left."""
        return tuple(self.curve.log10[lag] for lag in self.lags)

    @property
    def stderr(self) -> tuple[float, ...]:
        """The standard error of log10 R(k) at each of `lags`."""
        return tuple(self.curve.stderr[lag] for lag in self.lags)

    @property
    def interval(self) -> tuple[tuple[float, float], ...]:
        """The 95 % interval of log10 R(k) at each of `lags`."""
        bounds = self.curve.interval
        return tuple(bounds[lag] for lag in self.lags)

    def effective_length(self, epsilon: float = 1e-2) -> int:
        """T_eff(eps) = max{k : R(j) >= eps for all j <= k}, at most the steps measured."""
        return self.curve.effective_length(epsilon)

    def effective_length_interval(self, epsilon: float = 1e-2) -> tuple[int, int]:
        """T_eff(eps) of the lower and of the upper 95 % bounds."""
        return self.curve.effective_length_interval(epsilon)


class LayerRetention(Retained):
    """The retention of one layer in one direction."""

    layer: int
    direction: Direction


class Retention(Measured, Retained):
    """The retention of a recurrence as a whole, and in `layers` of each layer and direction.

    Of stacked layers the one that keeps most at a lag carries the signal; of two directions
    the one that keeps less at the longest lag is given, and named by `direction`.
    """

    direction: Direction
    layers: tuple[LayerRetention, ...]
