"""What values hold of a recurrence on their way through the graph; see also test_readout.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from factories import recorded
from torch import Tensor, nn

from rnnguard.inspection.readout import source_of_calls
from rnnguard.inspection.timeaxis import Held
from rnnguard.inspection.walk import Walk

F, H, T, B = 3, 4, 6, 2
LAST = (T - 1,)
ALL = tuple(range(T))


class Behind(nn.Module):
    def __init__(self, head: Callable[[Tensor], Tensor], batch_first: bool) -> None:
        super().__init__()
        self.rnn = nn.GRU(F, H, batch_first=batch_first)
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


def held(head: Callable[[Tensor], Tensor], *, batch_first: bool = False) -> list[Held]:
    shape = (B, T, F) if batch_first else (T, B, F)
    recording = recorded(Behind(head, batch_first), torch.randn(*shape))
    return Walk(source_of_calls(recording.calls)).results()


@pytest.mark.parametrize(
    ("head", "steps", "axis"),
    [
        (lambda out: out.tanh(), ALL, 0),
        (lambda out: out[-1], LAST, None),
        (lambda out: out[2], (2,), None),
        (lambda out: out[1:4], (1, 2, 3), 0),
        (lambda out: out.transpose(0, 1), ALL, 1),
        (lambda out: out.permute(1, 2, 0), ALL, 2),
        (lambda out: out.unbind(0)[3], (3,), None),
        (lambda out: out.select(0, 5), LAST, None),
        (lambda out: torch.stack([out[1], out[4]]), (1, 4), 0),
        (lambda out: torch.cat([out[:2], out[4:]]), (0, 1, 4, 5), 0),
        (lambda out: out.narrow(0, 2, 3), (2, 3, 4), 0),
    ],
)
def test_steps_and_axis(
    head: Callable[[Tensor], Tensor], steps: tuple[int, ...], axis: int
) -> None:
    (found,) = held(head)
    assert (found.steps, found.axis) == (steps, axis)


@pytest.mark.parametrize("pool", [lambda out: out.mean(1), lambda out: out.max(1).values])
def test_pooling_holds_every_step_and_no_axis(pool: Callable[[Tensor], Tensor]) -> None:
    (found,) = held(pool, batch_first=True)
    assert (set(found.known), found.axis) == (set(ALL), None)


def test_the_axis_follows_batch_first() -> None:
    assert [h.axis for h in held(torch.tanh, batch_first=True)] == [1]
    assert [h.axis for h in held(torch.tanh)] == [0]


def test_a_running_sum_is_blurred() -> None:
    assert [h.blurred for h in held(lambda out: out.cumsum(0))] == [True]
    assert [h.blurred for h in held(lambda out: out.cumsum(2))] == [False]


def test_a_cut_state_holds_nothing() -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(F, H)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            out, h = self.rnn(x)
            return out, h.detach()

    recording = recorded(Cut(), torch.randn(T, B, F))
    assert [h.steps for h in Walk(source_of_calls(recording.calls)).results()] == [ALL]
