"""One line in a plain training loop.

An LSTM has to name a symbol that it saw 100 steps ago, with noise in between. With PyTorch's
default initialisation the gradient does not reach that far back; run with `--without` to see it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import rnnguard

SYMBOLS = 4


class Recall(nn.Module):
    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.lstm = nn.LSTM(SYMBOLS + 1, hidden, batch_first=True)
        self.head = nn.Linear(hidden, SYMBOLS)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.lstm(x)
        return self.head(out[:, -1])


def recall_batches(count: int, length: int, size: int = 32) -> Iterator[tuple[Tensor, Tensor]]:
    """The symbol stands at the first step, one-hot; the last channel is noise afterwards."""
    for _ in range(count):
        symbol = torch.randint(SYMBOLS, (size,))
        x = torch.zeros(size, length, SYMBOLS + 1)
        x[torch.arange(size), 0, symbol] = 1.0
        x[:, 1:, -1] = torch.randn(size, length - 1)
        yield x, symbol


def main(
    steps: int = 300, length: int = 100, *, stabilize: bool = True, seed: int = 0
) -> tuple[rnnguard.Report | None, float]:
    """The report, and the mean loss of the last 20 steps (chance is ln 4 = 1.39)."""
    torch.manual_seed(seed)
    model = Recall()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    loss_of = nn.CrossEntropyLoss()

    report = None
    if stabilize:
        sample = recall_batches(8, length)
        report = rnnguard.stabilize(model, optimizer, sample, loss=loss_of, memory=length)
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
