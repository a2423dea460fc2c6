"""Packed sequences of different lengths in a bidirectional LSTM that reads its final states.

Somewhere in each noisy sequence stands one symbol, which the model has to name. The final states
are `h_n[-2]` (forward, after the last step) and `h_n[-1]` (reverse, after the first step);
`out[:, -1]` would give padding, and one step of the reverse direction. The data are pairs of
inputs, here the tuple (x, lengths), and target.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import rnnguard

SYMBOLS = 4
Batch = tuple[tuple[Tensor, Tensor], Tensor]


class FindSymbol(nn.Module):
    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.lstm = nn.LSTM(SYMBOLS + 1, hidden, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * hidden, SYMBOLS)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        # pack_padded_sequence wants the lengths on the CPU, wherever x is.
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        _, (h_n, _) = self.lstm(packed)
        return self.head(torch.cat([h_n[-2], h_n[-1]], dim=-1))


def symbol_batches(count: int, longest: int, size: int = 32) -> Iterator[Batch]:
    """Sequences of half to full length, padded with zeros; the symbol stands at a random step."""
    for _ in range(count):
        lengths = torch.randint(longest // 2, longest + 1, (size,))
        symbol = torch.randint(SYMBOLS, (size,))
        place = (torch.rand(size) * lengths).long()
        x = torch.zeros(size, longest, SYMBOLS + 1)
        x[..., -1] = torch.randn(size, longest)
        x[torch.arange(size), place, symbol] = 1.0
        x[torch.arange(longest) >= lengths[:, None]] = 0.0
        yield (x, lengths), symbol


def main(
    steps: int = 300, longest: int = 60, *, stabilize: bool = True, seed: int = 0
) -> tuple[rnnguard.Report | None, float]:
    """The report, and the mean loss of the last 20 steps (chance is ln 4 = 1.39)."""
    torch.manual_seed(seed)
    model = FindSymbol()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    loss_of = nn.CrossEntropyLoss()

    report = None
    if stabilize:
        sample = symbol_batches(8, longest)
        report = rnnguard.stabilize(model, optimizer, sample, loss=loss_of)
        print(report)

    losses = []
    for step, ((x, lengths), symbol) in enumerate(symbol_batches(steps, longest), start=1):
        optimizer.zero_grad()
        loss = loss_of(model(x, lengths), symbol)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 50 == 0:
            print(f"step {step:4}  loss {loss.item():.3f}")

    last = losses[-20:]
    return report, sum(last) / len(last)


if __name__ == "__main__":
    main(stabilize="--without" not in sys.argv)
