"""Which part of a recurrence is read, where pieces are taken apart, joined or passed on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from factories import only_site, sites_in
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

F, H, T, B = 3, 4, 7, 5


class Model(nn.Module):
    """Two recurrences, a head and a score, used as `run` says."""

    def __init__(self, run: Callable[..., Any], both_ways: bool = False) -> None:
        super().__init__()
        self.lower = nn.GRU(F, H, batch_first=True, bidirectional=both_ways)
        self.upper = nn.GRU(H * (2 if both_ways else 1), H, batch_first=True)
        self.cell, self.next_cell = nn.GRUCell(F, H), nn.GRUCell(H, H)
        self.head, self.score = nn.Linear(H, 2), nn.Linear(H, 1)
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def readouts(run: Callable[..., Any], both_ways: bool = False) -> list[str]:
    model = Model(run, both_ways)
    return [found.record.readout for found in sites_in(model, torch.randn(B, T, F))]


def stacked_cells(m: Model, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    lower, upper = [m.cell(x[:, 0])], []
    upper.append(m.next_cell(lower[0]))
    for t in range(1, T):
        lower.append(m.cell(x[:, t], lower[-1]))
        upper.append(m.next_cell(lower[-1], upper[-1]))
    return lower, upper


def cells_in_one_list(m: Model, x: Tensor) -> Tensor:
    states, steps = None, []
    for t in range(T):
        states = m.cell(x[:, t], states)
        steps.append(m.next_cell(states, steps[-1] if steps else None))
    return torch.stack(steps, 1)


STACKED: dict[str, tuple[list[str], Callable[..., Any]]] = {
    "tagger": (["all_steps"] * 2, lambda m, x: m.head(m.upper(m.lower(x)[0])[0])),
    "last step": (["last_step"] * 2, lambda m, x: m.head(m.upper(m.lower(x)[0])[0][:, -1])),
    "mean": (["pooled"] * 2, lambda m, x: m.head(m.upper(m.lower(x)[0])[0].mean(1))),
    "final state": (
        ["last_step", "final_state"],
        lambda m, x: m.head(m.upper(m.lower(x)[0])[1][-1]),
    ),
    "norm between": (
        ["last_step"] * 2,
        lambda m, x: m.head(m.upper(functional.layer_norm(m.lower(x)[0], (H,)))[0][:, -1]),
    ),
    "cells, all": (["all_steps"] * 2, lambda m, x: torch.stack(stacked_cells(m, x)[1], 1)),
    "cells in one list": (["all_steps"] * 2, cells_in_one_list),
    "cells, last": (["final_state"] * 2, lambda m, x: m.head(stacked_cells(m, x)[1][-1])),
}


@pytest.mark.parametrize("way", STACKED)
def test_a_lower_recurrence_is_read_as_the_upper_one(way: str) -> None:
    expected, run = STACKED[way]
    assert readouts(run) == expected


def test_both_directions_below_another_recurrence_are_all_read() -> None:
    lower, upper = readouts(lambda m, x: m.head(m.upper(m.lower(x)[0])[0][:, -1]), both_ways=True)
    assert (lower, upper) == ("pooled", "last_step")


def stepped(m: Model, x: Tensor, state: Any = None) -> tuple[list[Tensor], list[Tensor]]:
    """The fused recurrence called for one step at a time."""
    outs, states = [], []
    for t in range(T):
        out, state = m.lower(x[:, t : t + 1], state)
        outs.append(out)
        states.append(state)
    return outs, states


STEPPED: dict[str, tuple[str, Callable[..., Any]]] = {
    "state per step": ("all_steps", lambda m, x: [m.head(h[-1]) for h in stepped(m, x)[1]]),
    "states stacked": (
        "all_steps",
        lambda m, x: torch.stack([m.head(h[-1]) for h in stepped(m, x)[1]], 1),
    ),
    "output per step": ("all_steps", lambda m, x: [m.head(o[:, 0]) for o in stepped(m, x)[0]]),
    "outputs joined": ("all_steps", lambda m, x: m.head(torch.cat(stepped(m, x)[0], 1))),
    "outputs joined, last": (
        "last_step",
        lambda m, x: m.head(torch.cat(stepped(m, x)[0], 1))[:, -1],
    ),
    "outputs pooled": ("pooled", lambda m, x: m.head(torch.cat(stepped(m, x)[0], 1).mean(1))),
    "last output": ("last_step", lambda m, x: m.head(stepped(m, x)[0][-1])),
    "last output squeezed": ("last_step", lambda m, x: m.head(stepped(m, x)[0][-1].squeeze(1))),
    "last state": ("final_state", lambda m, x: m.head(stepped(m, x)[1][-1][-1])),
}


@pytest.mark.parametrize("way", STEPPED)
def test_a_fused_module_called_step_by_step(way: str) -> None:
    expected, run = STEPPED[way]
    assert readouts(run) == [expected]


def decoded(m: Model, x: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
    memory, state = m.lower(x)
    token, tokens, outs = x.new_zeros(B, 1, H), [], []
    for _ in range(4):
        token, state = m.upper(token, state)
        outs.append(token)
        tokens.append(m.head(token))
    return tokens, outs, memory


def attending(m: Model, x: Tensor) -> Tensor:
    _, outs, memory = decoded(m, x)
    return m.head(functional.scaled_dot_product_attention(torch.cat(outs, 1), memory, memory))


ENCODERS: dict[str, tuple[list[str], Callable[..., Any]]] = {
    "decoder over a sequence": (
        ["final_state", "all_steps"],
        lambda m, x: m.head(m.upper(x.new_zeros(B, 4, H), m.lower(x)[1])[0]),
    ),
    "decoder in a loop": (
        ["final_state", "all_steps"],
        lambda m, x: torch.cat(decoded(m, x)[0], 1),
    ),
    "decoder's last": (["final_state", "last_step"], lambda m, x: decoded(m, x)[0][-1]),
    "repeated": (
        ["final_state", "all_steps"],
        lambda m, x: m.head(m.upper(m.lower(x)[1][-1].unsqueeze(1).repeat(1, T, 1))[0]),
    ),
    "attention": (["pooled", "pooled"], attending),
}


@pytest.mark.parametrize("way", ENCODERS)
def test_an_encoder_is_read_at_its_end(way: str) -> None:
    expected, run = ENCODERS[way]
    assert readouts(run) == expected


def additive(m: Model, o: Tensor) -> Tensor:
    weights = m.score(o.reshape(-1, H)).view(B, T).softmax(1)
    return m.head(torch.bmm(weights.unsqueeze(1), o).squeeze(1))


def filled(m: Model, o: Tensor, steps: range) -> Tensor:
    out = o.new_zeros(B, T, 2)
    for t in steps:
        out[:, t] = m.head(o[:, t])
    return out


def last_query(m: Model, o: Tensor) -> Tensor:
    weights = torch.bmm(o, o[:, -1].unsqueeze(2)).softmax(1)
    return m.head(torch.bmm(weights.transpose(1, 2), o).squeeze(1) + o[:, -1])


def time_first(m: Model, o: Tensor) -> Tensor:
    o = o.transpose(0, 1)
    return m.head(o.reshape(-1, H)).view(T, B, 2)


ONE: dict[str, tuple[str, Callable[[Model, Tensor], Any]]] = {
    "steps stacked": (
        "all_steps",
        lambda m, o: torch.stack([m.head(o[:, t]) for t in range(T)], 1),
    ),
    "steps stacked, last": (
        "last_step",
        lambda m, o: torch.stack([m.head(o[:, t]) for t in range(T)], 1)[:, -1],
    ),
    "steps listed": ("all_steps", lambda m, o: [m.head(o[:, t]) for t in range(T)]),
    "slices joined": (
        "all_steps",
        lambda m, o: torch.cat([m.head(o[:, t : t + 1]) for t in range(T)], 1),
    ),
    "rows joined": ("all_steps", lambda m, o: torch.cat([m.head(o[:, t]) for t in range(T)])),
    "unbound": (
        "all_steps",
        lambda m, o: torch.stack([m.head(step) for step in o.unbind(1)], 1),
    ),
    "unbound, last": ("last_step", lambda m, o: [m.head(step) for step in o.unbind(1)][-1]),
    "iterated": ("all_steps", lambda m, o: [m.head(step) for step in o.transpose(0, 1)]),
    "filled": ("all_steps", lambda m, o: filled(m, o, range(T))),
    "filled with one": ("last_step", lambda m, o: filled(m, o, range(T - 1, T))),
    "one step": ("last_step", lambda m, o: m.head(o[:, T - 1])),
    "NumPy rows": (
        "last_step",
        lambda m, o: m.head(o[torch.arange(B).numpy(), torch.full((B,), 3).numpy()]),
    ),
    "NumPy mask": ("all_steps", lambda m, o: m.head(o[torch.ones(B, T).bool().numpy()])),
    "a new axis, then last": ("last_step", lambda m, o: m.head(o.unsqueeze(1)[:, 0, -1])),
    "merged": ("all_steps", lambda m, o: m.head(o.reshape(-1, H))),
    "merged and split": ("all_steps", lambda m, o: m.head(o.reshape(-1, H)).view(B, T, -1)),
    "merged and split, last": (
        "last_step",
        lambda m, o: m.head(o.reshape(-1, H)).view(B, T, -1)[:, -1],
    ),
    "merged and split, mean": (
        "pooled",
        lambda m, o: m.head(o.flatten(0, 1)).unflatten(0, (B, T)).mean(1),
    ),
    "merged time first, last": ("last_step", lambda m, o: time_first(m, o)[-1]),
    "merged time first": ("all_steps", time_first),
    "merged time first, one sample": ("all_steps", lambda m, o: time_first(m, o)[:, 0]),
    "std_mean": ("pooled", lambda m, o: m.head(torch.std_mean(o, 1)[1])),
    "var": ("pooled", lambda m, o: m.head(o.var(1))),
    "var_mean": ("pooled", lambda m, o: m.head(torch.var_mean(o, dim=1)[0])),
    "norm": ("pooled", lambda m, o: m.head(o.norm(dim=1))),
    "norm, order": ("pooled", lambda m, o: m.head(o.norm(2, 1))),
    "norm of features": ("all_steps", lambda m, o: o.norm(2, -1)),
    "cumsum, last": ("pooled", lambda m, o: m.head(o.cumsum(1)[:, -1])),
    "cummax, last": ("pooled", lambda m, o: m.head(o.cummax(1)[0][:, -1])),
    "cumsum of features, last": ("last_step", lambda m, o: m.head(o.cumsum(2)[:, -1])),
    "additive attention": ("pooled", additive),
    "last step as query": ("pooled", last_query),
    "sdpa": (
        "pooled",
        lambda m, o: m.head(functional.scaled_dot_product_attention(o[:, -1:], o, o)),
    ),
    "self-attention, then last": (
        "pooled",
        lambda m, o: m.head(functional.scaled_dot_product_attention(o, o, o)[:, -1]),
    ),
    "einsum with weights, then last": (
        "last_step",
        lambda m, o: torch.einsum("bth,ch->btc", o, m.head.weight)[:, -1],
    ),
    "einsum over time": ("pooled", lambda m, o: torch.einsum("bth,t->bh", o, torch.ones(T))),
    "a distribution": (
        "last_step",
        lambda m, o: torch.distributions.Categorical(logits=m.head(o[:, -1])),
    ),
    "a loss of all steps": ("all_steps", lambda m, o: m.head(o).flatten(0, 1).square().mean()),
    "a loss of the last step": ("last_step", lambda m, o: m.head(o[:, -1]).square().mean()),
    "losses added up": (
        "all_steps",
        lambda m, o: sum(m.head(o[:, t]).square().mean() for t in range(T)),
    ),
    "last and mean": ("pooled", lambda m, o: m.head(o[:, -1] + o.mean(1))),
    "last and mean, two heads": ("pooled", lambda m, o: (m.head(o[:, -1]), m.head(o.mean(1)))),
    "sum of single steps": ("pooled", lambda m, o: m.head(o[:, -1] + o[:, -2] + o[:, -3])),
    "last and its own gate": ("last_step", lambda m, o: m.head(o[:, -1] * o[:, -1].sigmoid())),
    "last beside the mean, per step": ("all_steps", lambda m, o: m.head(o - o.mean(1)[:, None])),
}  # fmt: skip


@pytest.mark.parametrize("way", ONE)
def test_ways_of_reading(way: str) -> None:
    expected, read = ONE[way]
    assert readouts(lambda m, x: read(m, m.lower(x)[0])) == [expected]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    ("expected", "read"),
    [
        ("last_step", lambda out, h: out[-1]),
        ("all_steps", lambda out, h: out),
        ("pooled", lambda out, h: out.mean(0)),
        ("final_state", lambda out, h: h[-1].tanh()),
        ("all_steps", lambda out, h: out[:, -1]),
    ],
)
def test_unbatched(batch_first: bool, expected: str, read: Callable[..., Tensor]) -> None:
    class Unbatched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(F, H, batch_first=batch_first)

        def forward(self, x: Tensor) -> Tensor:
            return read(*self.rnn(x))

    assert only_site(Unbatched(), torch.randn(T, F)).record.readout == expected


@pytest.mark.parametrize(
    ("expected", "read"),
    [
        (["last_step"] * 2, lambda m, out, h: m.head(out[:, -1])),
        (["last_step", "final_state"], lambda m, out, h: m.head(h[-1])),
        (["all_steps"] * 2, lambda m, out, h: m.head(out)),
    ],
)
@pytest.mark.parametrize("repacked", [True, False])
def test_packed_sequences_are_handed_up(
    repacked: bool, expected: list[str], read: Callable[..., Any]
) -> None:
    lengths = torch.tensor([7, 6, 5, 2, 1])

    def run(m: Model, x: Tensor) -> Any:
        packed, _ = m.lower(pack_padded_sequence(x, lengths, batch_first=True))
        if repacked:
            padded = pad_packed_sequence(packed, batch_first=True)[0].tanh()
            packed = pack_padded_sequence(padded, lengths, batch_first=True)
        packed, state = m.upper(packed)
        return read(m, pad_packed_sequence(packed, batch_first=True)[0], state)

    assert readouts(run) == expected


def masked(m: Model, x: Tensor) -> list[Tensor]:
    """Behind the end of a sample its state stays as it is."""
    ends = torch.tensor([7, 6, 5, 2, 1])
    state, states = x.new_zeros(B, H), []
    for t in range(T):
        fresh = m.cell(x[:, t], state)
        keep = (t < ends).float()[:, None]
        state = keep * fresh + (1 - keep) * state
        states.append(state)
    return states


@pytest.mark.parametrize(
    ("expected", "read"),
    [
        ("final_state", lambda m, states: m.head(states[-1])),
        ("all_steps", lambda m, states: torch.stack(states, 1)),
        ("pooled", lambda m, states: m.head(sum(states))),
    ],
)
def test_a_masked_update(expected: str, read: Callable[..., Any]) -> None:
    assert readouts(lambda m, x: read(m, masked(m, x))) == [expected]


HALVES: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "each direction's end": (
        "final_state",
        lambda o: torch.cat((o[:, -1, :H], o[:, 0, H:]), 1),
    ),
    "both halves of the last step": (
        "last_step",
        lambda o: torch.cat((o[:, -1, :H], o[:, -1, H:]), 1),
    ),
    "split, then each end": (
        "final_state",
        lambda o: torch.cat((o.split(H, 2)[0][:, -1], o.split(H, 2)[1][:, 0]), 1),
    ),
    "last step": ("last_step", lambda o: o[:, -1]),
    "first and last step": ("pooled", lambda o: o[:, 0] + o[:, -1]),
    "one direction's mean": ("pooled", lambda o: o[..., :H].mean(1)),
}


@pytest.mark.parametrize("way", HALVES)
def test_both_directions(way: str) -> None:
    expected, read = HALVES[way]
    assert readouts(lambda m, x: read(m.lower(x)[0]).tanh(), both_ways=True) == [expected]
