"""The four models: an embedding, a recurrence and a read-out of every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

import rnnguard
from rnnguard.bench.conditions import Conditions, Contender
from rnnguard.nn import IndRNN, LayerNormLSTM
from rnnguard.records import Change, Plan

EMBEDDING = 32
# A state that is carried from window to window goes through more steps than any window has; the
# authors' bound for that case.
BOUND = 0.99


class CharacterModel(nn.Module):
    """Tells the next character from those before it; forward takes and gives the state."""

    def __init__(self, characters: int, recurrence: nn.RNNBase) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, EMBEDDING)
        self.recurrence = recurrence
        self.head = nn.Linear(recurrence.hidden_size, characters)

    def forward(self, ids: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Logits (B, T, characters) of what follows ids (B, T), and the state behind them."""
        out, state = self.recurrence(self.embedding(ids), state)
        logits: Tensor = self.head(out)
        return logits, state


def _ind_rnn(*sizes: int, **options: Any) -> nn.RNNBase:
    return IndRNN(*sizes, bound=BOUND, **options)


RECURRENCES: dict[str, Callable[..., nn.RNNBase]] = {
    "rnn": nn.RNN,
    "lstm": nn.LSTM,
    "ln-lstm": LayerNormLSTM,
    "indrnn": _ind_rnn,
}


def built(
    contender: Contender, conditions: Conditions, characters: int, seed: int
) -> tuple[CharacterModel, Optimizer]:
    """A contender as it starts, and its optimizer; the same weights for the same seed."""
    # Layers draw their weights from the global generator, which is the caller's own.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kind = RECURRENCES[contender.name]
        recurrence = kind(EMBEDDING, conditions.hidden, contender.layers, batch_first=True)
        model = CharacterModel(characters, recurrence)
    model.to(conditions.device)
    optimizer = Adam(model.parameters(), lr=contender.rate)
    if contender.clip is not None:
        clip = {"max_norm": contender.clip}
        change = Change(remedy="clip_gradient", path=None, tier="step", dose=clip)
        rnnguard.apply(model, optimizer, Plan(changes=(change,)))
    return model, optimizer


def weights_of(model: CharacterModel) -> int:
    """How many weights the model has, without those that an IndRNN holds and never uses."""
    held = sum(parameter.numel() for parameter in model.parameters())
    if not isinstance(model.recurrence, IndRNN):
        return held
    hidden = model.recurrence.hidden_size
    return held - model.recurrence.num_layers * (hidden * hidden - hidden)
