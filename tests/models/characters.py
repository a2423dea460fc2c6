"""A character language model that keeps its state from window to window, cut from the graph.

Truncated backpropagation through time over parallel streams of a made-up text. The state lives on
the model: `reset()` at the start of a text, detached before every window.
"""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

State = tuple[Tensor, Tensor]
Batch = tuple[Tensor, Tensor, bool]

STREAMS, WINDOW = 12, 45
SUBJECTS = ("the captain", "a sailor", "the old cook", "my brother")
VERBS = ("mended", "lost", "sold", "painted")
OBJECTS = ("the anchor", "a lantern", "two barrels", "his coat")
CHARACTERS = sorted(set(" ".join(SUBJECTS + VERBS + OBJECTS) + ". "))

MEMORY = 8  # a word and what stands before it


class CharacterModel(nn.Module):
    def __init__(self, characters: int, embedding: int = 24, hidden: int = 128) -> None:
        super().__init__()
        self.hidden_size = hidden
        self.embedding = nn.Embedding(characters, embedding)
        self.lstm = nn.LSTM(embedding, hidden, batch_first=True)
        self.head = nn.Linear(hidden, characters)
        self.state: State | None = None
        for name, parameter in self.lstm.named_parameters():
            if name.startswith("bias"):
                nn.init.zeros_(parameter)
                if name.startswith("bias_ih"):
                    nn.init.ones_(parameter[hidden : 2 * hidden])  # the forget gate stays open

    def init_hidden(self, streams: int) -> State:
        weight = self.head.weight
        shape = (1, streams, self.hidden_size)
        return weight.new_zeros(shape), weight.new_zeros(shape)

    def reset(self) -> None:
        """Forget the text read so far."""
        self.state = None

    def forward(self, characters: Tensor) -> Tensor:
        if self.state is None or self.state[0].shape[1] != characters.shape[0]:
            self.state = self.init_hidden(characters.shape[0])
        h, c = self.state
        out, (h, c) = self.lstm(self.embedding(characters), (h, c))
        self.state = h.detach(), c.detach()
        scores: Tensor = self.head(out)
        return scores


def _text(length: int, generator: torch.Generator) -> str:
    text = ""
    while len(text) < length:
        parts = [
            words[int(torch.randint(0, len(words), (), generator=generator))]
            for words in (SUBJECTS, VERBS, OBJECTS)
        ]
        text += " ".join(parts) + ". "
    return text[:length]


def batches() -> list[Batch]:
    """Three windows in reading order: characters, following characters, whether the text begins."""
    generator = torch.Generator().manual_seed(4)
    number = {character: i for i, character in enumerate(CHARACTERS)}
    text = _text(STREAMS * (3 * WINDOW + 1), generator)
    streams = torch.tensor([number[character] for character in text]).view(STREAMS, -1)
    return [
        (streams[:, s : s + WINDOW], streams[:, s + 1 : s + WINDOW + 1], s == 0)
        for s in range(0, 3 * WINDOW, WINDOW)
    ]


def build() -> CharacterModel:
    return CharacterModel(len(CHARACTERS))


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=6e-3)


def step(model: CharacterModel, batch: Batch) -> Tensor:
    characters, following, begins = batch
    if begins:
        model.reset()
    scores = model(characters)
    return nn.functional.cross_entropy(scores.flatten(0, 1), following.flatten())


def train_step(model: CharacterModel, optimizer: torch.optim.Optimizer, batch: Batch) -> Tensor:
    model.train()
    optimizer.zero_grad()
    loss = step(model, batch)
    loss.backward()
    clip_grad_norm_(model.parameters(), max_norm=1.0)
    optimizer.step()
    return loss.detach()
