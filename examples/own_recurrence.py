"""A recurrence written by hand: gates in an order of its own, a Python loop over time.

It has to name a symbol that it saw 60 steps ago, with noise in between. The gate that keeps its
state is read off the graph that is recorded while it runs; run with `--without` to compare.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import rnnguard

SYMBOLS = 4


class OwnLSTM(nn.Module):
    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.hidden = hidden
        self.gates = nn.Linear(SYMBOLS + 1 + hidden, 4 * hidden)
        self.head = nn.Linear(hidden, SYMBOLS)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(len(x), self.hidden)
        for x_t in x.unbind(1):
            o, f, g, i = self.gates(torch.cat([x_t, h], 1)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        return self.head(h)


def recall_batches(count: int, length: int, size: int = 32) -> Iterator[tuple[Tensor, Tensor]]:
    """The symbol stands at the first step, one-hot; the last channel is noise afterwards."""
    for _ in range(count):
        symbol = torch.randint(SYMBOLS, (size,))
        x = torch.zeros(size, length, SYMBOLS + 1)
        x[torch.arange(size), 0, symbol] = 1.0
        x[:, 1:, -1] = torch.randn(size, length - 1)
        yield x, symbol


def main(
    steps: int = 300, length: int = 60, *, stabilize: bool = True, seed: int = 0
) -> tuple[rnnguard.Report | None, float]:
    """The report, and the mean loss of the last 20 steps (chance is ln 4 = 1.39)."""
    torch.manual_seed(seed)
    model = OwnLSTM()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    loss_of = nn.CrossEntropyLoss()

    report = None
    if stabilize:
        report = rnnguard.stabilize(model, optimizer, recall_batches(8, length), loss=loss_of)
        print(report)

    losses = []
    for step, (x, symbol) in enumerate(recall_batches(steps, length), start=1):
        optimizer.zero_grad()
        loss = loss_of(model(x), symbol)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 50 == 0:
            print(f"step {step:4}  loss {loss.item():.3f}")

    last = losses[-20:]
    return report, sum(last) / len(last)


if __name__ == "__main__":
    main(stabilize="--without" not in sys.argv)
