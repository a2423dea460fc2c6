"""A text classifier: packed bidirectional LSTM, both final states side by side, one label a text.

Made-up reviews: words of one of four topics turn up at random places between neutral words.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence

Batch = tuple[tuple[Tensor, Tensor], Tensor]

PAD, TOPICS, TOPIC_WORDS, VOCABULARY = 0, 4, 5, 200
SHORTEST, LONGEST, SPACING = 20, 50, 6

MEMORY = 2 * SPACING  # from the last topic word to the end, and from the first to the start


class Classifier(nn.Module):
    def __init__(
        self, vocabulary: int, classes: int, embedding: int = 64, hidden: int = 80
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding, padding_idx=PAD)
        self.encoder = nn.LSTM(embedding, hidden, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(2 * hidden, classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Forget gates that open for as long as topic words lie apart, the input gates as tight."""
        opening = math.log(2 * MEMORY)
        for name, parameter in self.encoder.named_parameters():
            if "weight_hh" in name:
                for gate in parameter.chunk(4):
                    nn.init.orthogonal_(gate)
            elif "bias" in name:
                nn.init.zeros_(parameter)
                if "bias_ih" in name:
                    enter, forget, _, _ = parameter.chunk(4)
                    nn.init.constant_(forget, opening)
                    nn.init.constant_(enter, -opening / 2)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(
            self.embedding(tokens), lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        _, (h_n, _) = self.encoder(packed)
        both = torch.cat([h_n[-2], h_n[-1]], dim=-1)
        scores: Tensor = self.head(self.dropout(both))
        return scores


def _text(topic: int, generator: torch.Generator) -> Tensor:
    first_neutral = 1 + TOPICS * TOPIC_WORDS
    length = int(torch.randint(SHORTEST, LONGEST + 1, (), generator=generator))
    words = torch.randint(first_neutral, VOCABULARY, (length,), generator=generator)
    for start in range(0, length, SPACING):
        place = start + int(torch.randint(0, SPACING, (), generator=generator))
        word = int(torch.randint(0, TOPIC_WORDS, (), generator=generator))
        words[min(place, length - 1)] = 1 + topic * TOPIC_WORDS + word
    return words


def batches(size: int = 24) -> list[Batch]:
    generator = torch.Generator().manual_seed(2)
    made = []
    for _ in range(3):
        topics = torch.randint(0, TOPICS, (size,), generator=generator)
        texts = [_text(int(topic), generator) for topic in topics]
        lengths = torch.tensor([len(text) for text in texts])
        made.append(((pad_sequence(texts, True, PAD), lengths), topics))
    return made


def build() -> Classifier:
    return Classifier(VOCABULARY, TOPICS)


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)


def step(model: nn.Module, batch: Batch) -> Tensor:
    (tokens, lengths), topics = batch
    return nn.functional.cross_entropy(model(tokens, lengths), topics)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> Tensor:
    model.train()
    optimizer.zero_grad(set_to_none=True)
    loss = step(model, batch)
    loss.backward()
    clip_grad_norm_(model.parameters(), max_norm=1.0)
    optimizer.step()
    return loss.detach()
