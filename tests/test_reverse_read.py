"""How many steps the states have seen that are read of a bidirectional recurrence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from factories import recorded
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

from rnnguard.inspection.batches import random_projection
from rnnguard.inspection.sites import find_sites
from rnnguard.probe.reverse_read import StepsSeen, steps_seen
from rnnguard.probe.snapshot import fingerprint, untouched

B, T, F, H = 5, 7, 3, 4
LENGTHS = torch.tensor([7, 6, 4, 4, 2])
Run = Callable[..., Any]


class Net(nn.Module):
    """A recurrence in both directions with a head; `run` says what is read."""

    def __init__(self, run: Run, kind: Any, **options: Any) -> None:
        super().__init__()
        self.rnn = kind(F, H, **{"bidirectional": True, "batch_first": True} | options)
        self.head, self.run = nn.Linear(2 * H, 2), run

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def seen(run: Run, kind: Any = nn.GRU, x: Tensor | None = None, **options: Any) -> Any:
    model = Net(run, kind, **options)
    given = torch.randn(B, T, F) if x is None else x
    with untouched(model):
        recording = recorded(model, given)
        (site,) = find_sites(model, recording)
        return steps_seen(site, recording, random_projection(recording.result, 0))


def counts(run: Run, **options: Any) -> tuple[int | None, int | None]:
    found = seen(run, **options)
    assert isinstance(found, StepsSeen)
    return found.forward, found.reverse


def of_output(read: Callable[[Tensor], Tensor]) -> Run:
    return lambda m, x: read(m.rnn(x)[0])


READ: dict[str, tuple[tuple[int | None, int | None], Callable[[Tensor], Tensor]]] = {
    "last step": ((T, 1), lambda out: out[:, -1]),
    "last step, all features": ((T, 1), lambda out: out[:, -1, :].relu()),
    "select": ((T, 1), lambda out: out.select(1, T - 1)),
    "sum of the directions": ((T, 1), lambda out: out.view(B, T, 2, H).sum(2)[:, -1]),
    "first step": ((1, T), lambda out: out[:, 0]),
    "in between": ((4, 4), lambda out: out[:, 3]),
    "forward half": ((T, None), lambda out: out[:, -1, :H]),
    "reverse half of the last step": ((None, 1), lambda out: out[:, -1, H:]),
    "own ends": ((T, T), lambda out: torch.cat([out[:, -1, :H], out[:, 0, H:]], 1)),
    "wrong ends": ((1, 1), lambda out: torch.cat([out[:, 0, :H], out[:, -1, H:]], 1)),
    "mean": ((T, T), lambda out: out.mean(1)),
    "all": ((T, T), lambda out: out),
    "two steps": ((T, T - 2), lambda out: out[:, [2, -1]].flatten(1)),
    "attention": ((T, T), lambda out: (out.sum(-1, keepdim=True).softmax(1) * out).sum(1)),
}


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_of_the_output(name: str, kind: Any) -> None:
    expected, read = READ[name]
    assert counts(of_output(read), kind=kind) == expected


def last_states(m: Net, x: Tensor) -> Any:
    h = m.rnn(x)[1]
    return torch.cat([h[-2], h[-1]], 1)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_stacked_layers(layers: int) -> None:
    assert counts(of_output(lambda out: out[:, -1]), num_layers=layers) == (T, 1)
    assert counts(last_states, num_layers=layers) == (T, T)


def test_last_states_beside_the_last_step() -> None:
    both = lambda m, x: (lambda out, h: out[:, -1] + torch.cat([h[0], h[1]], 1))(*m.rnn(x))  # noqa: E731
    assert counts(both) == (T, T)
    assert counts(lambda m, x: m.rnn(x)[1][0]) == (T, None)
    assert counts(lambda m, x: m.rnn(x)[1][1][-1], kind=nn.LSTM) == (None, T)


def test_time_first_projected_and_in_half_precision() -> None:
    assert counts(of_output(lambda out: out[-1]), batch_first=False) == (B, 1)
    assert (
        counts(of_output(lambda out: out[:, -1]), kind=nn.LSTM, dropout=0.5, num_layers=2)[1] == 1
    )
    narrow = of_output(lambda out: out[:, -1])
    x = torch.randn(B, T, F, dtype=torch.bfloat16)
    assert counts(narrow, x=x, dtype=torch.bfloat16) == (T, 1)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")
def test_projected() -> None:
    assert counts(of_output(lambda out: out[:, -1]), kind=nn.LSTM, proj_size=2) == (T, 1)


def test_a_batch_of_one_and_no_batch() -> None:
    assert counts(of_output(lambda out: out[:, -1]), x=torch.randn(1, T, F)) == (T, 1)
    assert counts(of_output(lambda out: out[-1]), x=torch.randn(T, F)) == (T, 1)


def packed(m: Net, x: Tensor, lengths: Tensor = LENGTHS) -> tuple[Tensor, Tensor]:
    given = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    out, h = m.rnn(given)
    return pad_packed_sequence(out, batch_first=True)[0], h


def own_last_step(m: Net, x: Tensor) -> Any:
    return packed(m, x)[0][torch.arange(B), LENGTHS - 1]


def gathered(m: Net, x: Tensor) -> Any:
    index = (LENGTHS - 1).view(-1, 1, 1).expand(-1, 1, 2 * H)
    return packed(m, x)[0].gather(1, index).squeeze(1)


def masked_mean(m: Net, x: Tensor) -> Any:
    return packed(m, x)[0].sum(1) / LENGTHS[:, None]


def test_packed_sequences() -> None:
    assert counts(own_last_step) == (T, 1)
    assert counts(gathered) == (T, 1)
    # Behind the shorter ones there is nothing but zeros.
    assert counts(lambda m, x: packed(m, x)[0][:, -1]) == (T, 1)
    assert counts(masked_mean) == (T, T)
    assert counts(lambda m, x: torch.cat(list(packed(m, x)[1]), 1)) == (T, T)
    shuffled = LENGTHS[[3, 0, 4, 1, 2]]
    third = lambda m, x: packed(m, x, shuffled)[0][2, 0]  # noqa: E731
    assert counts(third) == (1, 2)


def test_padded_sequences() -> None:
    lengths = torch.tensor([7, 5, 4, 4, 2])
    x = torch.randn(B, T, F) * (torch.arange(T) < lengths[:, None]).unsqueeze(-1)
    read = lambda m, x: m.rnn(x)[0][torch.arange(B), lengths - 1]  # noqa: E731
    assert counts(read, x=x) == (T, 1)
    assert counts(of_output(lambda out: out[:, -1]), x=x) == (T, 1)


def test_the_place_is_where_one_step_is_taken() -> None:
    def read(m: Net, x: Tensor) -> Any:
        out, _ = m.rnn(x)
        out = out.relu()
        last = out[:, -1]
        return m.head(last)

    place = seen(read).place
    assert place.endswith(f"test_reverse_read.py:{read.__code__.co_firstlineno + 3}")
    assert seen(of_output(lambda out: out.mean(1))).place is None


def in_pieces(m: Net, x: Tensor) -> Any:
    out, state = m.rnn(x[:, :4])
    out, state = m.rnn(x[:, 4:], state)
    return out[:, -1]


def test_what_is_not_known() -> None:
    one_way = of_output(lambda out: out[:, -1, :H])
    assert seen(one_way, bidirectional=False) is None
    without = of_output(lambda out: out[:, -1].detach())
    assert seen(without) is None
    again = lambda m, x: checkpoint(lambda x: m.rnn(x)[0][:, -1], x, use_reentrant=True)  # noqa: E731
    assert seen(again, x=torch.randn(B, T, F, requires_grad=True)) is None
    # Its states go on to the next piece.
    assert counts(in_pieces) == (4, 4)


def test_nothing_read_is_not_zero_steps() -> None:
    def silent(m: Net, x: Tensor) -> Any:
        return m.rnn(x)[0][:, -1] * 0 + m.head.weight.sum()

    assert counts(silent) == (None, None)


def test_the_model_is_left_as_it_was() -> None:
    model, x = Net(of_output(lambda out: out[:, -1]), nn.LSTM), torch.randn(B, T, F)
    before = fingerprint(model)
    with untouched(model):
        recording = recorded(model, x)
        (site,) = find_sites(model, recording)
        loss = random_projection(recording.result, 0)
        assert steps_seen(site, recording, loss) is not None
        # The graph can still be differentiated by whoever comes next.
        assert loss is not None
        assert torch.autograd.grad(loss, [*model.rnn.parameters()]) is not None
    assert fingerprint(model) == before
