"""Three classifiers, one line: tanh RNN, ReLU RNN and LSTM on the same handwritten digits.

Each makes its own zero state inside forward and reads the last step, `out[:, -1, :]`. The report
says for each what was done and what was taken back. It rests on measured gradients, not on scores:
run with `--without` as well, and compare.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

import rnnguard
from rnnguard.demo import accuracy, digit_sequences, drawn_batches

HIDDEN = 64


class TanhClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(1, HIDDEN, batch_first=True)
        self.fc = nn.Linear(HIDDEN, 10)

    def forward(self, x: Tensor) -> Tensor:
        h0 = torch.zeros(1, x.size(0), HIDDEN, device=x.device)
        out, _ = self.rnn(x, h0)
        return self.fc(out[:, -1, :])


class ReluClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(1, HIDDEN, nonlinearity="relu", batch_first=True)
        self.fc = nn.Linear(HIDDEN, 10)

    def forward(self, x: Tensor) -> Tensor:
        h0 = torch.zeros(1, x.size(0), HIDDEN, device=x.device)
        out, _ = self.rnn(x, h0)
        return self.fc(out[:, -1, :])


class LSTMClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(1, HIDDEN, batch_first=True)
        self.fc = nn.Linear(HIDDEN, 10)

    def forward(self, x: Tensor) -> Tensor:
        h0 = torch.zeros(1, x.size(0), HIDDEN, device=x.device)
        c0 = torch.zeros(1, x.size(0), HIDDEN, device=x.device)
        out, _ = self.lstm(x, (h0, c0))
        return self.fc(out[:, -1, :])


CLASSIFIERS = (TanhClassifier, ReluClassifier, LSTMClassifier)


def main(
    steps: int = 400, *, stabilize: bool = True, seed: int = 0
) -> dict[str, tuple[rnnguard.Report | None, float]]:
    """For each classifier the report and the accuracy on digits that it was not trained on."""
    train, held_out = digit_sequences()
    batches = drawn_batches(train, steps, seed)
    results = {}
    for classifier in CLASSIFIERS:
        torch.manual_seed(seed)
        model = classifier()
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        loss_of = nn.CrossEntropyLoss()
        report = None
        if stabilize:
            report = rnnguard.stabilize(model, optimizer, batches, loss=loss_of)
            print(f"\n{classifier.__name__}\n{report}\n")
        for x, y in batches:
            optimizer.zero_grad()
            loss_of(model(x), y).backward()
            optimizer.step()
        results[classifier.__name__] = report, accuracy(model, held_out)
    for name, (_, share) in results.items():
        print(f"{name:16} {share:.1%} of the held-out digits")
    return results


if __name__ == "__main__":
    main(stabilize="--without" not in sys.argv)
