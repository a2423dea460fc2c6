"""What a loop carries from step to step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from factories import recorded
from torch import Tensor, nn

from rnnguard.inspection.loops import Loop, find_loops

F, H, T, B = 3, 4, 8, 2
Forward = Callable[["Cell", Tensor], Tensor]


class Cell(nn.Module):
    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.into, self.state, self.more = nn.Linear(F, H), nn.Linear(H, H), nn.Linear(H, H)
        self.gates = nn.Linear(F + H, 4 * H)
        self.given = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.given(self, x)


def loop_of(forward: Forward) -> Loop:
    (loop,) = find_loops(recorded(Cell(forward), torch.randn(T, B, F)).graph)
    assert (loop.kind, loop.steps) == ("time", T)
    return loop


def names(loop: Loop, boundary: int) -> list[str]:
    return [node.meta["name"] for node in loop.carried.states[boundary - 1]]


def shapes(loop: Loop) -> set[tuple[tuple[int, ...], ...]]:
    return {tuple(node.meta["shape"] for node in found) for found in loop.carried.states}


def vanilla(m: Cell, x: Tensor) -> Tensor:
    h = x.new_zeros(B, H)
    for now in x:
        h = torch.tanh(m.into(now) + m.state(h))
    return h


def lstm(m: Cell, x: Tensor) -> Tensor:
    h = c = x.new_zeros(B, H)
    for now in x:
        i, f, g, o = m.gates(torch.cat([now, h], -1)).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
    return h


def with_output(m: Cell, x: Tensor) -> Tensor:
    """What is read out of the state is not carried on."""
    h, outputs = x.new_zeros(B, H), []
    for now in x:
        h = torch.tanh(m.into(now) + m.state(h))
        outputs.append(torch.relu(m.more(h)))
    return torch.stack(outputs)


def running_sum(m: Cell, x: Tensor) -> Tensor:
    """The sum of the states is not read by the steps."""
    h, total = x.new_zeros(B, H), x.new_zeros(B, H)
    for now in x:
        h = torch.tanh(m.into(now) + m.state(h))
        total = total + h
    return total


def detached(m: Cell, x: Tensor) -> Tensor:
    h = x.new_zeros(B, H)
    for now in x:
        h = torch.tanh(m.into(now) + m.state(h)).detach()
    return m.more(h)


def delayed(m: Cell, x: Tensor) -> Tensor:
    before = now = x.new_zeros(B, H)
    for given in x:
        before, now = now, torch.tanh(m.state(now) + m.more(before) + m.into(given))
    return now


def attending(m: Cell, x: Tensor) -> Tensor:
    """Looks back on all of its states."""
    states = [torch.tanh(m.into(x[0]))]
    for now in x:
        past = torch.stack(states)
        seen = ((past * states[-1]).sum(-1, keepdim=True).softmax(0) * past).sum(0)
        states.append(torch.tanh(m.into(now) + m.state(seen)))
    return states[-1]


@pytest.mark.parametrize(
    ("forward", "carried"),
    [
        (vanilla, ["tanh"]),
        (lstm, ["add", "mul"]),
        (with_output, ["tanh"]),
        (running_sum, ["tanh"]),
        (detached, ["tanh"]),
        (delayed, ["tanh", "tanh"]),
    ],
)
def test_what_lives_across_each_boundary(forward: Forward, carried: list[str]) -> None:
    loop = loop_of(forward)
    assert len(loop.carried.states) == T
    assert not loop.carried.reads_own_past
    assert [names(loop, i) for i in range(2, T + 1)] == [carried] * (T - 1)
    assert shapes(loop) <= {((B, H),) * n for n in (1, 2)}


def test_no_value_is_carried_twice_and_each_is_of_its_own_step() -> None:
    for forward in (vanilla, lstm, with_output):
        states = loop_of(forward).carried.states
        every = [node for found in states for node in found]
        assert len(every) == len(set(every))
        ends = [max(node.meta["order"] for node in found) for found in states]
        assert ends == sorted(ends)


def test_a_history_that_piles_up_is_left_out() -> None:
    """However many states it looks back on, as much is carried behind every step."""
    loop = loop_of(attending)
    assert loop.carried.reads_own_past
    counts = [len(found) for found in loop.carried.states]
    assert len(set(counts[1:])) == 1
    order = [use.meta["order"] for use in loop.uses]
    for step, found in enumerate(loop.carried.states):
        oldest = min(node.meta["order"] for node in found)
        assert oldest > order[max(0, step - 2)]


def test_a_call_whose_result_is_seen_late_ends_the_states() -> None:
    """No step is told twice where the last value cannot be placed."""

    def forward(m: Cell, x: Tensor) -> Tensor:
        h, outputs = x.new_zeros(B, H), []
        for now in x:
            a = m.into(now) + m.state(h)
            h = a.sin() if len(outputs) == T - 1 else a.tanh()
            outputs.append(h)
        return torch.stack(outputs)

    loop = loop_of(forward)
    assert [names(loop, i) for i in range(1, T)] == [["tanh"]] * (T - 1)
    assert len(loop.carried.states) == T - 1
