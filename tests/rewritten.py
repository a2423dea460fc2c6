"""Small models whose recurrence has been given its norm through the public door."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnnguard
from rnnguard.nn.output_norm import OUTPUT_NORMS, output_width

IN, HIDDEN, STEPS, BATCH = 5, 6, 9, 4
KINDS: dict[str, type[nn.RNNBase]] = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
LENGTHS = torch.tensor([5, STEPS, 1, 3])


class Net(nn.Module):
    """A recurrence over a batch (B, T, F), and a head at every step."""

    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.rnn = rnn
        self.head = nn.Linear(output_width(rnn), 2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.rnn(x)[0])
        return logits


class PackedNet(Net):
    """The same over sequences of these lengths, in any order."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:  # type: ignore[override]
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        rows, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        logits: Tensor = self.head(rows)
        return logits


def plain(kind: str, net: type[Net] = Net, **form: Any) -> Net:
    return net(KINDS[kind](IN, HIDDEN, batch_first=True, **form))


def normed(model: nn.Module, path: str = "rnn") -> nn.Module:
    """The model with a norm behind this recurrence, drawn so that it does something."""
    change = {"remedy": "layer_norm", "path": path, "tier": "structure", "dose": {}}
    plan = {"schema_version": 1, "changes": [{**change, "scenario": "a test", "why": ""}]}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    rnnguard.apply(model, optimizer, plan)
    norm = model.get_submodule(f"{path}.output_norm" if path else "output_norm")
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias)
    assert type(model.get_submodule(path)) in OUTPUT_NORMS.values()
    return model


def rewritten(kind: str, net: type[Net] = Net, **form: Any) -> nn.Module:
    return normed(plain(kind, net, **form))


def batch(count: int = BATCH, steps: int = STEPS) -> Tensor:
    return torch.randn(count, steps, IN)
