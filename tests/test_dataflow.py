"""What the recorded graph says of a recurrence: who reads it, what surrounds it, what cuts it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from factories import only_site, recorded
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from rnnguard.inspection.dataflow import link

F, H, T, B = 3, 4, 6, 5
LENGTHS = torch.tensor([6, 5, 4, 2, 1])


class Reader(nn.Module):
    """A recurrence, with layers that a way of reading may use."""

    def __init__(self, rnn: nn.Module, read: Callable[..., Any]) -> None:
        super().__init__()
        self.rnn, self.read = rnn, read
        width = H * 2 if getattr(rnn, "bidirectional", False) else H
        self.head = nn.Linear(width, 2)
        self.score = nn.Linear(width, 1)
        self.matrix = nn.Parameter(torch.randn(width, 2))
        self.over_time = nn.Parameter(torch.randn(2, T))
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.pool = nn.AdaptiveMaxPool1d(1)
        self.same = nn.Linear(F, H)

    def forward(self, x: Tensor) -> Any:
        out, state = self.rnn(x)
        h_n = state[0] if isinstance(state, tuple) else state
        return self.read(self, out, h_n)


def attended(m: Reader, out: Tensor, h_n: Tensor) -> Tensor:
    """Additive attention: a weight for each step, the weighted sum over them."""
    weights = functional.softmax(m.score(out), dim=1)
    return m.head(torch.bmm(weights.transpose(1, 2), out).squeeze(1))


def gathered(m: Reader, out: Tensor, h_n: Tensor) -> Tensor:
    index = (LENGTHS - 1)[:, None, None].expand(-1, 1, out.shape[2])
    return m.head(out.gather(1, index).squeeze(1))


def dotted(m: Reader, out: Tensor, h_n: Tensor) -> Tensor:
    """Attention of the last state over all steps."""
    weights = (out @ h_n[-1].unsqueeze(2)).softmax(1)
    return m.head((out * weights).sum(1))


BATCH_FIRST: dict[str, tuple[str, Callable[[Reader, Tensor, Tensor], Any]]] = {
    "out[:, -1]": ("last_step", lambda m, out, h: m.head(out[:, -1])),
    "out[:, -1, :]": ("last_step", lambda m, out, h: m.head(out[:, -1, :])),
    "out[:, 0]": ("last_step", lambda m, out, h: m.head(out[:, 0])),
    "out[..., -1, :]": ("last_step", lambda m, out, h: m.head(out[..., -1, :])),
    "out[:, -1:]": ("last_step", lambda m, out, h: m.head(out[:, -1:])),
    "out[:, T-1:T]": ("last_step", lambda m, out, h: m.head(out[:, T - 1 : T])),
    "out[:, None, -1]": ("last_step", lambda m, out, h: m.head(out[:, None, -1])),
    "select": ("last_step", lambda m, out, h: m.head(out.select(1, -1))),
    "narrow": ("last_step", lambda m, out, h: m.head(out.narrow(1, T - 1, 1))),
    "unbind, one": ("last_step", lambda m, out, h: m.head(out.unbind(1)[-1])),
    "unbind, all": ("all_steps", lambda m, out, h: [m.head(step) for step in out.unbind(1)]),
    "transpose": ("last_step", lambda m, out, h: m.head(out.transpose(0, 1)[-1])),
    "permute": ("last_step", lambda m, out, h: m.head(out.permute(1, 0, 2)[-1])),
    "features first": ("last_step", lambda m, out, h: m.head(out.permute(0, 2, 1)[:, :, -1])),
    "movedim": ("last_step", lambda m, out, h: m.head(out.movedim(1, 0)[-1])),
    "one sample turned": ("last_step", lambda m, out, h: m.head(out[0].T[:, -1])),
    "mean over samples, then step": ("last_step", lambda m, out, h: m.head(out.mean(0)[-1])),
    "mT": ("last_step", lambda m, out, h: m.head(out.mT[..., -1])),
    "dropout, then step": (
        "last_step",
        lambda m, out, h: m.head(functional.dropout(out, 0.5)[:, -1]),
    ),
    "norm, then step": ("last_step", lambda m, out, h: m.head(m.norm(out)[:, -1])),
    "head, then step": ("last_step", lambda m, out, h: m.head(out)[:, -1]),
    "rows": ("last_step", lambda m, out, h: m.head(out[torch.arange(B), LENGTHS - 1])),
    "gather": ("last_step", gathered),
    "one sample, then step": ("last_step", lambda m, out, h: m.head(out[0][-1])),
    "sample selected, then step": ("last_step", lambda m, out, h: m.head(out.select(0, 2)[-1])),
    "h_n[-1]": ("final_state", lambda m, out, h: m.head(h[-1])),
    "h_n.squeeze": ("final_state", lambda m, out, h: m.head(h.squeeze(0))),
    "mean": ("pooled", lambda m, out, h: m.head(out.mean(1))),
    "mean(dim)": ("pooled", lambda m, out, h: m.head(out.mean(dim=1))),
    "mean(axis)": ("pooled", lambda m, out, h: m.head(out.mean(axis=1))),
    "mean(-2)": ("pooled", lambda m, out, h: m.head(out.mean(-2))),
    "sum of two": ("pooled", lambda m, out, h: out.sum((1, 2))),
    "max": ("pooled", lambda m, out, h: m.head(out.max(1)[0])),
    "torch.max": ("pooled", lambda m, out, h: m.head(torch.max(out, dim=1).values)),
    "max pool": ("pooled", lambda m, out, h: m.head(m.pool(out.transpose(1, 2)).squeeze(2))),
    "max pool of all": (
        "pooled",
        lambda m, out, h: m.head(functional.max_pool1d(out.transpose(1, 2), T).squeeze(2)),
    ),
    "masked mean": (
        "pooled",
        lambda m, out, h: m.head((out * (out > 0)).sum(1) / LENGTHS[:, None]),
    ),
    "where, then max": (
        "pooled",
        lambda m, out, h: m.head(torch.where(out > 0, out, -1.0).max(1)[0]),
    ),
    "window, then mean": ("pooled", lambda m, out, h: m.head(out[:, -3:].mean(1))),
    "attention": ("pooled", attended),
    "dot attention": ("pooled", dotted),
    "multi-head attention": ("pooled", lambda m, out, h: m.attention(h[-1][:, None], out, out)),
    "linear": ("all_steps", lambda m, out, h: m.head(out)),
    "matrix over time": ("pooled", lambda m, out, h: m.over_time @ out),
    "matrix": ("all_steps", lambda m, out, h: out @ m.matrix),
    "softmax per step": ("all_steps", lambda m, out, h: m.head(out).softmax(-1)),
    "log_softmax per step": ("all_steps", lambda m, out, h: functional.log_softmax(m.head(out), 2)),
    "flattened": ("all_steps", lambda m, out, h: m.head(out.reshape(-1, H))),
    "mean over features": ("all_steps", lambda m, out, h: out.mean(2)),
    "masked rows": ("all_steps", lambda m, out, h: m.head(out[out[:, :, 0] > 0])),
    "handed out": ("all_steps", lambda m, out, h: (out, h)),
    "steps and state": ("all_steps", lambda m, out, h: (m.head(out), m.head(h[-1]))),
    "state, output ignored": ("final_state", lambda m, out, h: m.head(torch.tanh(h[-1]))),
    "nothing": ("unknown", lambda m, out, h: m.head(m.matrix.new_ones(B, H))),
}  # fmt: skip


@pytest.mark.parametrize("way", BATCH_FIRST)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_ways_of_reading(way: str, kind: type[nn.RNNBase]) -> None:
    expected, read = BATCH_FIRST[way]
    model = Reader(kind(F, H, batch_first=True), read)
    assert only_site(model, torch.randn(B, T, F)).record.readout == expected


TIME_FIRST: dict[str, tuple[str, Callable[[Reader, Tensor, Tensor], Any]]] = {
    "out[-1]": ("last_step", lambda m, out, h: m.head(out[-1])),
    "out[-1, :, :]": ("last_step", lambda m, out, h: m.head(out[-1, :, :])),
    "out[-1:]": ("last_step", lambda m, out, h: m.head(out[-1:])),
    "transpose": ("last_step", lambda m, out, h: m.head(out.transpose(0, 1)[:, -1])),
    "one sample": ("all_steps", lambda m, out, h: m.head(out[:, 0])),
    "mean": ("pooled", lambda m, out, h: m.head(out.mean(0))),
    "linear": ("all_steps", lambda m, out, h: m.head(out)),
    "h_n[-1]": ("final_state", lambda m, out, h: m.head(h[-1])),
}


@pytest.mark.parametrize("way", TIME_FIRST)
def test_ways_of_reading_time_first(way: str) -> None:
    expected, read = TIME_FIRST[way]
    model = Reader(nn.LSTM(F, H), read)
    assert only_site(model, torch.randn(T, B, F)).record.readout == expected


def cat(*parts: Tensor) -> Tensor:
    return torch.cat(parts, 1)


def apart(out: Tensor) -> tuple[Tensor, Tensor]:
    forward, backward = out.view(B, T, 2, H).unbind(2)
    return forward, backward


BIDIRECTIONAL: dict[str, tuple[str, Callable[[Reader, Tensor, Tensor], Any]]] = {
    "last step": ("last_step", lambda m, out, h: m.head(out[:, -1])),
    "last step of all features": ("last_step", lambda m, out, h: m.head(out[:, -1, :])),
    "both states": ("final_state", lambda m, out, h: m.head(cat(h[-2], h[-1]))),
    "halves": ("final_state", lambda m, out, h: m.head(cat(out[:, -1, :H], out[:, 0, H:]))),
    "halves, -H": ("final_state", lambda m, out, h: m.head(cat(out[:, -1, :-H], out[:, 0, -H:]))),
    "halves, dots": (
        "final_state",
        lambda m, out, h: m.head(cat(out[:, -1, ..., :H], out[:, 0, ..., H:])),
    ),
    "steps, then halves": (
        "final_state",
        lambda m, out, h: m.head(cat(out[:, -1][:, :H], out[:, 0][:, H:])),
    ),
    "select, then halves": (
        "final_state",
        lambda m, out, h: m.head(cat(out.select(1, -1)[..., :H], out.select(1, 0)[..., H:])),
    ),
    "steps, then chunks": (
        "final_state",
        lambda m, out, h: m.head(cat(out[:, -1].chunk(2, -1)[0], out[:, 0].chunk(2, -1)[1])),
    ),
    "halves, then steps": (
        "final_state",
        lambda m, out, h: m.head(cat(out[:, :, :H][:, -1], out[:, :, H:][:, 0])),
    ),
    "chunks, then steps": (
        "final_state",
        lambda m, out, h: m.head(cat(out.chunk(2, 2)[0][:, -1], out.chunk(2, 2)[1][:, 0])),
    ),
    "directions as an axis": (
        "final_state",
        lambda m, out, h: m.head(
            cat(out.view(B, T, 2, H)[:, -1, 0], out.view(B, T, 2, H)[:, 0, 1])
        ),
    ),
    "directions unbound": (
        "final_state",
        lambda m, out, h: m.head(cat(apart(out)[0][:, -1], apart(out)[1][:, 0])),
    ),
    "directions added, then last step": (
        "last_step",
        lambda m, out, h: (out[:, :, :H] + out[:, :, H:])[:, -1],
    ),
    "last step and one half": (
        "last_step",
        lambda m, out, h: (m.head(out[:, -1]), out[:, 0, H:]),
    ),
    "mean": ("pooled", lambda m, out, h: m.head(out.mean(1))),
    "halves, all steps": ("all_steps", lambda m, out, h: out[:, :, :H] * out[:, :, H:]),
}


@pytest.mark.parametrize("way", BIDIRECTIONAL)
def test_ways_of_reading_both_directions(way: str) -> None:
    expected, read = BIDIRECTIONAL[way]
    model = Reader(nn.LSTM(F, H, bidirectional=True, batch_first=True), read)
    assert only_site(model, torch.randn(B, T, F)).record.readout == expected


def test_halves_time_first() -> None:
    def read(m: Reader, out: Tensor, h: Tensor) -> Tensor:
        return m.head(cat(out[-1, :, :H], out[0, :, H:]))

    model = Reader(nn.GRU(F, H, bidirectional=True), read)
    assert only_site(model, torch.randn(T, B, F)).record.readout == "final_state"


PACKED: dict[str, tuple[str, Callable[[Reader, Tensor, Tensor], Any]]] = {
    "last step": ("last_step", lambda m, out, h: m.head(out[:, -1])),
    "gather": ("last_step", gathered),
    "mean": ("pooled", lambda m, out, h: m.head(out.mean(1))),
    "state": ("final_state", lambda m, out, h: m.head(h[-1])),
    "all": ("all_steps", lambda m, out, h: m.head(out)),
}


@pytest.mark.parametrize("way", PACKED)
@pytest.mark.parametrize("batch_first", [True, False])
def test_ways_of_reading_packed(way: str, batch_first: bool) -> None:
    class Packing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(F, H, batch_first=batch_first)

        def forward(self, x: Tensor) -> Any:
            packed = pack_padded_sequence(
                x, LENGTHS.flip(0), batch_first=batch_first, enforce_sorted=False
            )
            out, state = self.rnn(packed)
            return pad_packed_sequence(out, batch_first=batch_first)[0], state

    expected, read = PACKED[way]
    padded = Packing()

    def read_either(m: Reader, out: Tensor, h: Tensor) -> Any:
        return read(m, out if batch_first else out.transpose(0, 1), h)

    model = Reader(padded, read_either)
    x = torch.randn((B, T, F) if batch_first else (T, B, F))
    assert only_site(model, x).record.readout == expected


class Loop(nn.Module):
    """A cell in a loop, whose states are read as `read` says."""

    def __init__(self, read: Callable[[list[Tensor]], Any]) -> None:
        super().__init__()
        self.cell, self.head, self.read = nn.GRUCell(F, H), nn.Linear(H, 2), read

    def forward(self, x: Tensor) -> Any:
        states = [self.cell(x[0])]
        for step in x[1:]:
            states.append(self.cell(step, states[-1]))
        return self.read(states)


@pytest.mark.parametrize(
    ("expected", "read"),
    [
        ("final_state", lambda states: states[-1].sum(1)),
        ("all_steps", lambda states: [state.sum(1) for state in states]),
        ("all_steps", lambda states: torch.stack(states)),
        ("last_step", lambda states: torch.stack(states, 1)[:, -1]),
        ("pooled", lambda states: torch.stack(states, dim=1).mean(1)),
        ("pooled", lambda states: torch.stack(states).max(0)[0]),
    ],
)
def test_ways_of_reading_a_loop(expected: str, read: Callable[[list[Tensor]], Any]) -> None:
    assert only_site(Loop(read), torch.randn(T, B, F)).record.readout == expected


@pytest.mark.parametrize(
    ("expected", "read"),
    [
        (True, lambda m, out, h: m.head(m.norm(out)[:, -1])),
        (True, lambda m, out, h: m.head(m.norm(functional.dropout(out[:, -1], 0.1)))),
        (True, lambda m, out, h: functional.layer_norm(out.transpose(0, 1), (H,))),
        (True, lambda m, out, h: functional.rms_norm(out, (H,))),
        (True, lambda m, out, h: functional.batch_norm(out[:, -1], None, None, training=True)),
        (False, lambda m, out, h: m.head(out[:, -1])),
        (False, lambda m, out, h: functional.layer_norm(m.head(out), (2,))),
    ],
)
def test_normalized(expected: bool, read: Callable[..., Any]) -> None:
    model = Reader(nn.GRU(F, H, batch_first=True), read)
    assert only_site(model, torch.randn(B, T, F)).record.normalized is expected


class Wrapped(nn.Module):
    """Something between the model's input and the recurrence, and something behind it."""

    def __init__(self, before: Callable[[Tensor], Tensor], after: Callable[..., Any]) -> None:
        super().__init__()
        self.rnn = nn.GRU(H, H, batch_first=True)
        self.before, self.after = before, after

    def forward(self, x: Tensor) -> Any:
        given = self.before(x)
        return self.after(self.rnn(given)[0], given, x)


@pytest.mark.parametrize(
    ("expected", "before", "after"),
    [
        (True, torch.tanh, lambda out, given, x: out + given),
        (True, torch.tanh, lambda out, given, x: given + out),
        (True, torch.tanh, lambda out, given, x: torch.add(functional.dropout(out, 0.1), given)),
        (True, lambda x: functional.layer_norm(x, (H,)), lambda out, given, x: out + x),
        (False, torch.tanh, lambda out, given, x: out),
        (False, torch.tanh, lambda out, given, x: out + 1.0),
        (False, torch.tanh, lambda out, given, x: out + torch.ones(H)),
        (False, torch.tanh, lambda out, given, x: out * given),
    ],
)
def test_residual(
    expected: bool, before: Callable[[Tensor], Tensor], after: Callable[..., Any]
) -> None:
    assert only_site(Wrapped(before, after), torch.randn(B, T, H)).record.residual is expected


class Two(nn.Module):
    """Two calls; `between` makes the second one's state from the first one's."""

    def __init__(self, rnn: nn.Module, between: Callable[[Any], Any]) -> None:
        super().__init__()
        self.rnn, self.between = rnn, between

    def forward(self, x: Tensor) -> Any:
        return self.rnn(x, self.between(self.rnn(x)[1]))


@pytest.mark.parametrize(
    ("linked", "cut", "between"),
    [
        (True, False, lambda state: state),
        (True, False, lambda state: state * torch.ones(H)),
        (True, True, lambda state: state.detach()),
        (True, True, lambda state: state.data),
        (True, True, lambda state: torch.no_grad()(torch.mul)(state, 2.0)),
        (True, True, lambda state: (state.detach() * 0.5).clone()),
        (False, False, lambda state: None),
        (False, False, lambda state: torch.zeros_like(state)),
        (False, False, lambda state: state.new_zeros(1, B, H)),
    ],
)
def test_link(linked: bool, cut: bool, between: Callable[[Any], Any]) -> None:
    first, second = recorded(Two(nn.GRU(F, H), between), torch.randn(T, B, F)).calls
    found = link(first, second)
    assert (found.linked, found.cut) == (linked, cut)


@pytest.mark.parametrize(
    ("cut", "between"),
    [
        (False, lambda state: state),
        (True, lambda state: tuple(part.detach() for part in state)),
        (False, lambda state: (state[0].detach(), state[1])),
    ],
)
def test_link_of_pairs(cut: bool, between: Callable[[Any], Any]) -> None:
    """Gradient passes while one part of the state is whole."""
    first, second = recorded(Two(nn.LSTM(F, H), between), torch.randn(T, B, F)).calls
    assert link(first, second).cut is cut
