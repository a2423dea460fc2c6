"""A character language model with truncated backpropagation through time and mixed precision.

Embedding, two LSTM layers and a head; forward takes and returns the state, which is detached
between windows. The text is the English reference that comes with Python. Runs on the CPU with
bfloat16 and on a CUDA device with float16 and a GradScaler: the guard in the optimizer clips by
the true norm, not by the scaled one. Every step is read out, so that the memory needed is unknown
unless you declare it; without it only the optimizer is guarded.
"""

from __future__ import annotations

import math
import sys
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn

import rnnguard

State = tuple[Tensor, Tensor]


class CharModel(nn.Module):
    def __init__(self, characters: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, 32)
        self.lstm = nn.LSTM(32, hidden, num_layers=2, batch_first=True)
        self.head = nn.Linear(hidden, characters)

    def forward(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        out, state = self.lstm(self.embedding(ids), state)
        return self.head(out), state


def text_windows(size: int, window: int) -> tuple[list[tuple[Tensor, Tensor]], int]:
    """Windows (ids, next ids) of `size` parallel streams in reading order; number of characters."""
    text = "\n".join(topics.values())
    characters = sorted(set(text))
    number = {character: i for i, character in enumerate(characters)}
    ids = torch.tensor([number[character] for character in text])
    streams = ids[: len(ids) // size * size].view(size, -1)
    starts = range(0, streams.shape[1] - window, window)
    pairs = [(streams[:, s : s + window], streams[:, s + 1 : s + window + 1]) for s in starts]
    return pairs, len(characters)


def mean_nats(output: tuple[Tensor, State], target: Tensor) -> Tensor:
    logits, _ = output
    return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())


def main(
    steps: int = 300,
    window: int = 64,
    hidden: int = 128,
    *,
    memory: int | None = None,
    stabilize: bool = True,
    seed: int = 0,
) -> tuple[rnnguard.Report | None, list[float]]:
    """The report, and the loss of every step in nats per character."""
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = torch.float16 if device == "cuda" else torch.bfloat16

    windows, characters = text_windows(size=32, window=window)
    model = CharModel(characters, hidden).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    scaler = torch.amp.GradScaler(device, enabled=device == "cuda")

    report = None
    if stabilize:
        sample = [(ids.to(device), following.to(device)) for ids, following in windows[:8]]
        report = rnnguard.stabilize(model, optimizer, sample, loss=mean_nats, memory=memory)
        print(report)

    state, losses = None, []
    for step in range(steps):
        position = step % len(windows)
        if position == 0:
            state = None  # the text starts again
        ids, following = (part.to(device) for part in windows[position])
        optimizer.zero_grad()
        with torch.amp.autocast(device, dtype=precision):
            output = model(ids, state)
            loss = mean_nats(output, following)
        scaler.scale(loss).backward()
        scaler.step(optimizer)  # the guard clips in here, no unscale_ needed
        scaler.update()
        state = tuple(part.detach() for part in output[1])
        losses.append(loss.item())
        if (step + 1) % 50 == 0:
            recent = sum(losses[-50:]) / 50
            print(f"step {step + 1:4}  {recent:.3f} nats, {recent / math.log(2):.3f} bits/char")
    return report, losses


if __name__ == "__main__":
    main(stabilize="--without" not in sys.argv)
