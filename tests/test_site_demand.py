"""What the data demand of a site is told by what the site is given."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import rnnguard
from rnnguard.probe.snapshot import fingerprint

B, T, H, COUNT = 64, 30, 8, 4


class Model(nn.Module):
    """A GRU, torch's or written by hand, read out at the end or at every step."""

    def __init__(self, *, own: bool, every: bool, classes: int = 4, features: int = 5) -> None:
        super().__init__()
        self.own, self.every = own, every
        self.rnn = nn.GRU(features, H, batch_first=True)
        self.x2h, self.h2h = nn.Linear(features, 2 * H), nn.Linear(H, 2 * H)
        self.head = nn.Linear(H, classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.steps(x) if self.own else self.rnn(x)[0]
        return self.head(out if self.every else out[:, -1])

    def steps(self, x: Tensor) -> Tensor:
        h, states = x.new_zeros(len(x), H), []
        for x_t in x.unbind(1):
            z, n = (self.x2h(x_t) + self.h2h(h)).chunk(2, 1)
            h = z.sigmoid() * h + (1 - z.sigmoid()) * n.tanh()
            states.append(h)
        return torch.stack(states, 1)


def recall(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(4, (B,), generator=generator)
    x = torch.zeros(B, T, 5)
    x[torch.arange(B), 0, label] = 1
    x[:, 1:, 4] = torch.randn(B, T - 1, generator=generator)
    return x, label


def echo(seed: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(B, T, 1, generator=torch.Generator().manual_seed(seed))
    return x, torch.cat([torch.zeros(B, 7, 1), x[:, :-7]], 1)


@pytest.mark.parametrize("own", [False, True])
def test_the_end_of_a_sequence_asks_for_its_beginning(own: bool) -> None:
    model, data = Model(own=own, every=False), [recall(seed) for seed in range(COUNT)]
    before = fingerprint(model)
    report = rnnguard.audit(model, None, data, loss=nn.CrossEntropyLoss())
    assert fingerprint(model) == before
    (site,) = report.now.sites
    assert (site.memory_needed, site.memory_source) == (T, "estimated")
    assert site.memory_needed_interval is not None and site.memory_needed_interval[0] > T - 3


@pytest.mark.parametrize("own", [False, True])
def test_every_step_asks_for_the_lag_that_it_echoes(own: bool) -> None:
    model = Model(own=own, every=True, classes=1, features=1)
    report = rnnguard.audit(model, None, [echo(seed) for seed in range(COUNT)], loss=nn.MSELoss())
    (site,) = report.now.sites
    assert site.memory_source == "estimated" and site.memory_needed in (7, 8, 9)


def test_targets_without_signal_ask_for_nothing() -> None:
    data = [(x, y[torch.randperm(B)]) for x, y in map(recall, range(COUNT))]
    report = rnnguard.audit(Model(own=False, every=False), None, data, loss=nn.CrossEntropyLoss())
    assert report["rnn"].memory_source == "assumed"


def test_a_pool_over_the_steps_asks_for_nothing() -> None:
    class Pooled(Model):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0].mean(1))

    data = [recall(seed) for seed in range(COUNT)]
    pooled = Pooled(own=False, every=False)
    report = rnnguard.audit(pooled, None, data, loss=nn.CrossEntropyLoss())
    assert (report["rnn"].memory_needed, report["rnn"].level) == (None, "unknown")


class Packed(nn.Module):
    """Sequences of several lengths, packed by torch's own sorting, read at their ends."""

    def __init__(self, layers: int = 1) -> None:
        super().__init__()
        self.rnns = nn.ModuleList(nn.LSTM(5 if i == 0 else H, H) for i in range(layers))
        self.head = nn.Linear(H, 4)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        for rnn in self.rnns:
            packed, (h, _) = rnn(packed)
        return self.head(h[-1])


@pytest.mark.parametrize("layers", [1, 2])
def test_rows_that_packing_sorted_meet_their_own_targets(layers: int) -> None:
    data = []
    for seed in range(COUNT):
        x, label = recall(seed)
        lengths = torch.randint(10, T + 1, (B,), generator=torch.Generator().manual_seed(seed))
        data.append(((x, lengths), label))
    report = rnnguard.audit(Packed(layers), None, data, loss=nn.CrossEntropyLoss())
    first = report["rnns.0"]
    # The symbol stands at each sequence's own first step, some 10 to T steps before its end.
    assert first.memory_source == "estimated" and (first.memory_needed or 0) > 20
