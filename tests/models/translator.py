"""Sequence to sequence with attention: a packed bidirectional GRU reads, a GRU cell writes.

Made-up translation: every word has one foreign word, and the order of the words is reversed.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

Batch = tuple[Tensor, Tensor, Tensor]

PAD, BEGIN, END, FIRST_WORD = 0, 1, 2, 3
SOURCE_WORDS, TARGET_WORDS = 33, 35

MEMORY = 4  # attention bridges the distance; the states keep the neighbourhood and the place


def _orthogonal(recurrent: nn.Module) -> None:
    for name, parameter in recurrent.named_parameters():
        if "weight_hh" in name:
            for gate in parameter.chunk(3):
                nn.init.orthogonal_(gate)
        elif "weight_ih" in name:
            nn.init.xavier_uniform_(parameter)
        else:
            nn.init.zeros_(parameter)


class Encoder(nn.Module):
    def __init__(self, embedding: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SOURCE_WORDS, embedding, padding_idx=PAD)
        self.gru = nn.GRU(embedding, hidden, batch_first=True, bidirectional=True)
        self.bridge = nn.Linear(2 * hidden, hidden)
        _orthogonal(self.gru)

    def forward(self, source: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        packed = pack_padded_sequence(
            self.embedding(source), lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        packed_out, h_n = self.gru(packed)
        memory, _ = pad_packed_sequence(packed_out, batch_first=True)
        first_state = torch.tanh(self.bridge(torch.cat([h_n[0], h_n[1]], dim=-1)))
        return memory, first_state


class AdditiveAttention(nn.Module):
    def __init__(self, query: int, key: int, hidden: int) -> None:
        super().__init__()
        self.query = nn.Linear(query, hidden)
        self.key = nn.Linear(key, hidden, bias=False)
        self.score = nn.Linear(hidden, 1, bias=False)

    def forward(self, state: Tensor, memory: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
        scores = self.score(torch.tanh(self.query(state).unsqueeze(1) + keys)).squeeze(-1)
        weights = scores.masked_fill(~mask, float("-inf")).softmax(dim=-1)
        return torch.bmm(weights.unsqueeze(1), memory).squeeze(1)


class Translator(nn.Module):
    def __init__(self, embedding: int = 40, hidden: int = 96) -> None:
        super().__init__()
        self.encoder = Encoder(embedding, hidden)
        self.embedding = nn.Embedding(TARGET_WORDS, embedding, padding_idx=PAD)
        self.attention = AdditiveAttention(hidden, 2 * hidden, hidden)
        self.cell = nn.GRUCell(embedding + 2 * hidden, hidden)
        self.head = nn.Linear(3 * hidden, TARGET_WORDS)
        _orthogonal(self.cell)

    def forward(self, source: Tensor, lengths: Tensor, target: Tensor) -> Tensor:
        """Scores of the word after each word of `target`, which is given as the past."""
        memory, state = self.encoder(source, lengths)
        mask = torch.arange(memory.shape[1], device=lengths.device) < lengths.unsqueeze(1)
        keys = self.attention.key(memory)
        scores = []
        for word in self.embedding(target).unbind(dim=1):
            context = self.attention(state, memory, keys, mask)
            state = self.cell(torch.cat([word, context], dim=-1), state)
            scores.append(self.head(torch.cat([state, context], dim=-1)))
        return torch.stack(scores, dim=1)


def batches(size: int = 20) -> list[Batch]:
    generator = torch.Generator().manual_seed(3)
    words = SOURCE_WORDS - FIRST_WORD
    foreign = FIRST_WORD + torch.randperm(words, generator=generator)
    made = []
    for _ in range(3):
        lengths = torch.randint(8, 23, (size,), generator=generator)
        sources = [
            torch.randint(FIRST_WORD, SOURCE_WORDS, (int(length),), generator=generator)
            for length in lengths
        ]
        ends = torch.tensor([BEGIN]), torch.tensor([END])
        targets = [
            torch.cat([ends[0], foreign[source.flip(0) - FIRST_WORD], ends[1]])
            for source in sources
        ]
        made.append((pad_sequence(sources, True, PAD), lengths, pad_sequence(targets, True, PAD)))
    return made


def build() -> Translator:
    return Translator()


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=4e-3)


def step(model: nn.Module, batch: Batch) -> Tensor:
    source, lengths, target = batch
    scores = model(source, lengths, target[:, :-1])
    return nn.functional.cross_entropy(
        scores.flatten(0, 1), target[:, 1:].flatten(), ignore_index=PAD
    )


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> Tensor:
    model.train()
    optimizer.zero_grad()
    loss = step(model, batch)
    loss.backward()
    clip_grad_norm_(model.parameters(), max_norm=1.0)
    optimizer.step()
    return loss.detach()
