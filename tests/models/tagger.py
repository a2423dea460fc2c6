"""A sequence tagger: embedding, two LSTM layers, one label per token, padding left out of the loss.

Made-up language: an opening word of one of three kinds starts a span that runs for some words;
every word inside is tagged with the kind of its opening word, every other word with OUTSIDE.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence

Batch = tuple[Tensor, Tensor, Tensor]

PAD, OUTSIDE, IGNORED = 0, 0, -100
KINDS, LONGEST_SPAN, VOCABULARY = 3, 6, 90
WIDTH = 40  # the loader pads every batch to the same width

MEMORY = LONGEST_SPAN


class Tagger(nn.Module):
    def __init__(self, vocabulary: int, tags: int, embedding: int = 48, hidden: int = 96) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding, padding_idx=PAD)
        self.dropout = nn.Dropout(0.2)
        self.lstm = nn.LSTM(embedding, hidden, num_layers=2, dropout=0.2, batch_first=True)
        self.head = nn.Linear(hidden, tags)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, parameter in self.lstm.named_parameters():
            if name.startswith("weight_hh"):
                for gate in parameter.chunk(4):
                    nn.init.orthogonal_(gate)
            elif name.startswith("weight_ih"):
                nn.init.xavier_uniform_(parameter)
            else:
                nn.init.zeros_(parameter)
                if name.startswith("bias_ih"):
                    nn.init.ones_(parameter.chunk(4)[1])

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        # Read left to right, so that padding on the right changes no label that counts.
        tokens = tokens[:, : int(lengths.max())]
        out, _ = self.lstm(self.dropout(self.embedding(tokens)))
        logits: Tensor = self.head(self.dropout(out))
        return logits


def _sentence(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens and tags; tokens 1 to KINDS open a span, the others are plain words."""
    length = int(torch.randint(12, 31, (), generator=generator))
    tokens = torch.randint(KINDS + 1, VOCABULARY, (length,), generator=generator)
    tags = torch.full((length,), OUTSIDE)
    position = int(torch.randint(0, 5, (), generator=generator))
    while position < length:
        kind = int(torch.randint(1, KINDS + 1, (), generator=generator))
        tokens[position] = kind
        tags[position : position + LONGEST_SPAN] = kind
        position += LONGEST_SPAN + int(torch.randint(1, 8, (), generator=generator))
    return tokens, tags


def batches(size: int = 16) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(3):
        sentences = [_sentence(generator) for _ in range(size)]
        lengths = torch.tensor([len(tokens) for tokens, _ in sentences])
        tokens = pad_sequence([tokens for tokens, _ in sentences], True, PAD)
        tags = pad_sequence([tags for _, tags in sentences], True, IGNORED)
        missing = WIDTH - tokens.shape[1]
        tokens = nn.functional.pad(tokens, (0, missing), value=PAD)
        tags = nn.functional.pad(tags, (0, missing), value=IGNORED)
        made.append((tokens, lengths, tags))
    return made


def build() -> Tagger:
    return Tagger(VOCABULARY, KINDS + 1)


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=5e-3)


def step(model: nn.Module, batch: Batch) -> Tensor:
    tokens, lengths, tags = batch
    logits = model(tokens, lengths)
    wanted = tags[:, : logits.shape[1]]
    return nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> Tensor:
    model.train()
    optimizer.zero_grad()
    loss = step(model, batch)
    loss.backward()
    clip_grad_norm_(model.parameters(), max_norm=1.0)
    optimizer.step()
    return loss.detach()
