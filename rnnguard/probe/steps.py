"""Every cell's steps and the closed-form products with their state Jacobian.

The state of an LSTM is (h, c), so its Jacobian is 2H x 2H (with `proj_size`,
P + H); nothing of it is ever formed. Source: differentiation of PyTorch's own
update formulas (torch.nn.RNN, GRU, LSTM).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from rnnguard.inspection.gates import GATES, Weights
from rnnguard.probe.stepping import State, Stepping
from rnnguard.records import Cell

Factors = dict[str, Tensor]


@dataclass(frozen=True)
class Trajectory:
    """One layer in one direction, run over its real inputs in its own order of time.

    outputs: h (T, B, P); gates: (T, B, H) each; factors: what the Jacobian products need,
    (T, B, H) each; lengths: (B,) steps; weights as the cell used them. stepping: of a module of
    rnnguard, whose factors are its inputs and states.
    """

    cell: Cell
    weights: Weights
    outputs: Tensor
    gates: dict[str, Tensor]
    factors: Factors
    lengths: Tensor
    stepping: Stepping | None = None

    @property
    def steps(self) -> int:
        return self.outputs.shape[0]

    @property
    def batch(self) -> int:
        return self.outputs.shape[1]

    @property
    def state_size(self) -> int:
        if self.stepping is not None:
            return sum(s.shape[-1] for s in _apart(self.factors)[1])
        cell_state = self.weights.hidden_size if GATES[self.cell].carries_cell_state else 0
        return self.weights.hh.shape[1] + cell_state

    def push(self, tangents: Tensor, factors: Factors) -> Tensor:
        """J v for tangents (B, k, n), with the factors of one step (B, H)."""
        if self.stepping is not None:
            return self.stepping.push(tangents, *_apart(factors))
        return _CELLS[self.cell].push(tangents, _aligned(factors), self.weights)

    def pull(self, cotangents: Tensor, factors: Factors) -> Tensor:
        """Transposed J times cotangents (B, k, n), with the factors of one step (B, H)."""
        if self.stepping is not None:
            return self.stepping.pull(cotangents, *_apart(factors))
        return _CELLS[self.cell].pull(cotangents, _aligned(factors), self.weights)

    def factors_at(self, times: Tensor) -> Factors:
        """The factors of each sequence at its own time; times (B,)."""
        rows = torch.arange(self.batch, device=times.device)
        return {name: value[times, rows] for name, value in self.factors.items()}


def run(
    cell: Cell,
    weights: Weights,
    x: Tensor,
    state: State,
    lengths: Tensor,
    stepping: Stepping | None = None,
) -> Trajectory:
    """Steps the cell over x (T, B, F) from its state (B, n) each; frozen behind each length."""
    step = _torchs_own(cell, weights, x) if stepping is None else _told(stepping, x)
    alive = torch.arange(len(x), device=x.device)[:, None] < lengths[None, :]
    parts: list[tuple[Tensor, Factors, Factors]] = []
    for time in range(len(x)):
        fresh, gates, factors = step(time, state)
        keep = alive[time][:, None]
        state = tuple(torch.where(keep, new, old) for new, old in zip(fresh, state, strict=True))
        parts.append((state[0], gates, factors))
    outputs = torch.stack([part[0] for part in parts])
    gates = {name: torch.stack([part[1][name] for part in parts]) for name in parts[0][1]}
    factors = {
        # An overflowed state has no slope; the run's own readings say that it overflowed.
        name: torch.stack([part[2][name] for part in parts]).nan_to_num(0.0, 0.0, 0.0)
        for name in parts[0][2]
    }
    return Trajectory(cell, weights, outputs, gates, factors, lengths, stepping)


_Step = Callable[[int, State], tuple[State, Factors, Factors]]


def _torchs_own(cell: Cell, weights: Weights, x: Tensor) -> _Step:
    driven = functional.linear(x, weights.ih, weights.bias_ih)
    return lambda time, state: _CELLS[cell].step(driven[time], state, weights)


def _told(stepping: Stepping, x: Tensor) -> _Step:
    def step(time: int, state: State) -> tuple[State, Factors, Factors]:
        met = {"x": x[time], **{f"state {i}": s for i, s in enumerate(state)}}
        return stepping.step(x[time], state), stepping.gates(x[time], state), met

    return step


def _apart(factors: Factors) -> tuple[Tensor, State]:
    """The input and the states that a told step met."""
    x, *state = factors.values()
    return x, tuple(state)


def _aligned(factors: Factors) -> Factors:
    """Factors (B, H) as (B, 1, H), so that they meet k vectors per sequence."""
    return {name: value[:, None, :] for name, value in factors.items()}


@dataclass(frozen=True)
class _CellMath:
    step: Callable[[Tensor, State, Weights], tuple[State, Factors, Factors]]
    push: Callable[[Tensor, Factors, Weights], Tensor]
    pull: Callable[[Tensor, Factors, Weights], Tensor]


def _recurrent(state: Tensor, weights: Weights) -> Tensor:
    return functional.linear(state, weights.hh, weights.bias_hh)


def _rnn_step(relu: bool) -> Callable[[Tensor, State, Weights], tuple[State, Factors, Factors]]:
    def step(driven: Tensor, state: State, weights: Weights) -> tuple[State, Factors, Factors]:
        total = driven + _recurrent(state[0], weights)
        h = total.clamp_min(0) if relu else total.tanh()
        slope = (total > 0).to(total.dtype) if relu else 1 - h * h
        return (h,), {"h": h}, {"slope": slope}

    return step


def _rnn_push(v: Tensor, factors: Factors, weights: Weights) -> Tensor:
    return factors["slope"] * (v @ weights.hh.T)


def _rnn_pull(g: Tensor, factors: Factors, weights: Weights) -> Tensor:
    return (g * factors["slope"]) @ weights.hh


def _gru_step(driven: Tensor, state: State, weights: Weights) -> tuple[State, Factors, Factors]:
    h = state[0]
    recurrent = _recurrent(h, weights)
    (r_x, z_x, n_x), (r_h, z_h, q) = driven.chunk(3, -1), recurrent.chunk(3, -1)
    r, z = (r_x + r_h).sigmoid(), (z_x + z_h).sigmoid()
    n = (n_x + r * q).tanh()
    new = (1 - z) * n + z * h
    candidate = (1 - z) * (1 - n * n)
    factors = {
        "keep": z,
        "to_z": (h - n) * z * (1 - z),
        "to_n": candidate * r,
        "to_r": candidate * q * r * (1 - r),
    }
    return (new,), {"r": r, "z": z, "n": n}, factors


def _gru_push(v: Tensor, factors: Factors, weights: Weights) -> Tensor:
    r, z, n = (v @ weights.hh.T).chunk(3, -1)
    return factors["keep"] * v + factors["to_z"] * z + factors["to_n"] * n + factors["to_r"] * r


def _gru_pull(g: Tensor, factors: Factors, weights: Weights) -> Tensor:
    stacked = torch.cat([g * factors["to_r"], g * factors["to_z"], g * factors["to_n"]], -1)
    return g * factors["keep"] + stacked @ weights.hh


def _lstm_step(driven: Tensor, state: State, weights: Weights) -> tuple[State, Factors, Factors]:
    h, c = state
    blocks = (driven + _recurrent(h, weights)).chunk(4, -1)
    i, f, g, o = blocks[0].sigmoid(), blocks[1].sigmoid(), blocks[2].tanh(), blocks[3].sigmoid()
    new_c = f * c + i * g
    squashed = new_c.tanh()
    new_h = o * squashed
    if weights.hr is not None:
        new_h = new_h @ weights.hr.T
    factors = {
        "keep": f,
        "to_i": g * i * (1 - i),
        "to_f": c * f * (1 - f),
        "to_g": i * (1 - g * g),
        "to_o": squashed * o * (1 - o),
        "out": o * (1 - squashed * squashed),
    }
    return (new_h, new_c), {"i": i, "f": f, "g": g, "o": o}, factors


def _lstm_push(v: Tensor, factors: Factors, weights: Weights) -> Tensor:
    width = weights.hh.shape[1]
    dh, dc = v[..., :width], v[..., width:]
    i, f, g, o = (dh @ weights.hh.T).chunk(4, -1)
    new_c = factors["keep"] * dc + factors["to_i"] * i + factors["to_f"] * f + factors["to_g"] * g
    new_h = factors["out"] * new_c + factors["to_o"] * o
    if weights.hr is not None:
        new_h = new_h @ weights.hr.T
    return torch.cat([new_h, new_c], -1)


def _lstm_pull(g: Tensor, factors: Factors, weights: Weights) -> Tensor:
    width = weights.hh.shape[1]
    gh, gc = g[..., :width], g[..., width:]
    if weights.hr is not None:
        gh = gh @ weights.hr
    total = gc + gh * factors["out"]
    blocks = [total * factors[name] for name in ("to_i", "to_f", "to_g")] + [gh * factors["to_o"]]
    return torch.cat([torch.cat(blocks, -1) @ weights.hh, total * factors["keep"]], -1)


_CELLS: dict[Cell, _CellMath] = {
    "rnn_tanh": _CellMath(_rnn_step(relu=False), _rnn_push, _rnn_pull),
    "rnn_relu": _CellMath(_rnn_step(relu=True), _rnn_push, _rnn_pull),
    "gru": _CellMath(_gru_step, _gru_push, _gru_pull),
    "lstm": _CellMath(_lstm_step, _lstm_push, _lstm_pull),
}
