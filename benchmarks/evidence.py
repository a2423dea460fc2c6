"""What training reaches with nothing, and with the one line; paired by seed, every run printed.

    python benchmarks/evidence.py [--seeds 5] [--only digits] [--output FILE.csv]

Each row of the CSV is one task with one cell: scores of both policies seed by seed, the
median paired difference, and the seeds that lost. Scenario rows cite these rows by name.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rnnguard
from rnnguard.demo import digit_sequences

Batch = tuple[Tensor, Tensor]


class Classifier(nn.Module):
    """A recurrence whose last output a linear head reads."""

    def __init__(self, rnn: nn.Module, classes: int) -> None:
        super().__init__()
        self.rnn = rnn
        self.head = nn.Linear(rnn.hidden_size, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


class OwnLSTM(nn.Module):
    """An LSTM as users write it: one Linear, a loop, gates in an order of its own."""

    def __init__(self, features: int, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.gates = nn.Linear(features + hidden_size, 4 * hidden_size)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        h = c = x.new_zeros(len(x), self.hidden_size)
        outputs = []
        for x_t in x.unbind(1):
            o, f, g, i = self.gates(torch.cat([x_t, h], 1)).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            outputs.append(h)
        return torch.stack(outputs, 1), None


class CharacterModel(nn.Module):
    """Embedding, two-layer LSTM and a head over every step; starts from a zero state."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, 32)
        self.rnn = nn.LSTM(32, 64, num_layers=2, batch_first=True)
        self.head = nn.Linear(64, characters)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(x))[0]).transpose(1, 2)


class Tagger(nn.Module):
    """Embedding, a deep LSTM and a head over every step."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 16)
        self.rnn = nn.LSTM(16, 24, num_layers=layers, batch_first=True)
        self.head = nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(x))[0]).transpose(1, 2)


@dataclass(frozen=True)
class Task:
    """One task with one cell: how to build the model, its batches, and its score (higher wins)."""

    name: str
    build: Callable[[], nn.Module]
    batches: Callable[[int], list[Batch]]
    score: Callable[[nn.Module], float]
    rate: float
    memory: int | None = None


def recall_batches(steps: int, batch: int, count: int, seed: int) -> Iterator[Batch]:
    """The first symbol among noise: one-hot label at step 0, N(0, 1) in channel 4 afterwards."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        label = torch.randint(4, (batch,), generator=generator)
        x = torch.zeros(batch, steps, 5)
        x[torch.arange(batch), 0, label] = 1
        x[:, 1:, 4] = torch.randn(batch, steps - 1, generator=generator)
        yield x, label


def adding_batches(steps: int, batch: int, count: int, seed: int) -> Iterator[Batch]:
    """The sum of the two marked values of a sequence of uniform ones."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(batch)
    for _ in range(count):
        x = torch.zeros(batch, steps, 2)
        x[..., 0] = torch.rand(batch, steps, generator=generator)
        first = torch.randint(steps // 2, (batch,), generator=generator)
        second = torch.randint(steps // 2, steps, (batch,), generator=generator)
        x[rows, first, 1] = x[rows, second, 1] = 1
        yield x, (x[rows, first, 0] + x[rows, second, 0])[:, None]


def tagging_batches(count: int, seed: int) -> Iterator[Batch]:
    """At each step the sum, modulo 8, of the present symbol and the one before."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.randint(8, (16, 30), generator=generator)
        yield x, torch.cat([x[:, :1], (x[:, 1:] + x[:, :-1]) % 8], 1)


def drawn(x: Tensor, y: Tensor, batch: int, count: int, seed: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    picks = (torch.randint(len(x), (batch,), generator=generator) for _ in range(count))
    return [(x[pick], y[pick]) for pick in picks]


def text_windows(length: int) -> tuple[Tensor, Tensor, int]:
    """Windows of the standard library's pydoc topics, shifted by one, and the alphabet's size."""
    from pydoc_data.topics import topics

    text = "".join(topics[key] for key in sorted(topics))[:200_000]
    alphabet = sorted(set(text))
    codes = {character: code for code, character in enumerate(alphabet)}
    ids = torch.tensor([codes[character] for character in text])
    pieces = ids[: (len(ids) - 1) // length * length + 1]
    return pieces[:-1].reshape(-1, length), pieces[1:].reshape(-1, length), len(alphabet)


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((model(x).argmax(-1) == y).double().mean())


def _recall(kind: str, rnn: Callable[[], nn.Module], steps: int) -> Task:
    held_out = next(recall_batches(steps, 512, 1, seed=10**6))
    return Task(
        f"recall T={steps}, {kind}",
        lambda: Classifier(rnn(), 4),
        lambda seed: list(recall_batches(steps, 32, 300, 1000 + seed)),
        lambda model: accuracy(model, *held_out),
        rate=3e-3,
    )


def _adding(kind: str, rnn: Callable[[], nn.Module], steps: int) -> Task:
    x, y = next(adding_batches(steps, 512, 1, seed=10**6))
    return Task(
        f"adding T={steps}, {kind}",
        lambda: Classifier(rnn(), 1),
        lambda seed: list(adding_batches(steps, 32, 1000, 1000 + seed)),
        lambda model: -float(nn.functional.mse_loss(model(x), y).detach()),
        rate=3e-3,
    )


def _digits(kind: str, rnn: Callable[[], nn.Module]) -> Task:
    (x, y), held_out = digit_sequences()
    return Task(
        f"digits, {kind}",
        lambda: Classifier(rnn(), 10),
        lambda seed: drawn(x, y, 64, 400, seed),
        lambda model: accuracy(model, *held_out),
        rate=2e-3,
    )


def _tagging(layers: int) -> Task:
    x, y = next(tagging_batches(1, seed=10**6))

    @torch.no_grad()
    def score(model: nn.Module) -> float:
        return float((model(x).argmax(1) == y).double().mean())

    return Task(
        f"tagging, {layers}-layer LSTM",
        lambda: Tagger(layers),
        lambda seed: list(tagging_batches(400, 1000 + seed)),
        score,
        rate=5e-3,
    )


def _characters(name: str, memory: int | None) -> Task:
    x, y, characters = text_windows(64)
    held_out = len(x) // 10

    @torch.no_grad()
    def score(model: nn.Module) -> float:
        return -float(nn.functional.cross_entropy(model(x[:held_out]), y[:held_out]))

    return Task(
        name,
        lambda: CharacterModel(characters),
        lambda seed: drawn(x[held_out:], y[held_out:], 32, 300, seed),
        score,
        rate=3e-3,
        memory=memory,
    )


def _cells(features: int, hidden: int) -> dict[str, Callable[[], nn.Module]]:
    return {
        "LSTM": lambda: nn.LSTM(features, hidden, batch_first=True),
        "GRU": lambda: nn.GRU(features, hidden, batch_first=True),
        "tanh RNN": lambda: nn.RNN(features, hidden, batch_first=True),
        "ReLU RNN": lambda: nn.RNN(features, hidden, batch_first=True, nonlinearity="relu"),
        "LSTM without bias": lambda: nn.LSTM(features, hidden, batch_first=True, bias=False),
        "GRU without bias": lambda: nn.GRU(features, hidden, batch_first=True, bias=False),
    }


def all_tasks() -> list[Task]:
    short, wide, adding = _cells(5, 32), _cells(1, 64), _cells(2, 32)
    return [
        *(_recall(kind, rnn, 100) for kind, rnn in short.items()),
        _recall("hand-written LSTM", lambda: OwnLSTM(5, 32), 60),
        *(_recall(kind, short[kind], 10) for kind in ("LSTM", "GRU", "tanh RNN")),
        *(_digits(kind, rnn) for kind, rnn in wide.items()),
        *(_adding(kind, adding[kind], 100) for kind in ("LSTM", "tanh RNN")),
        *(_tagging(layers) for layers in (2, 8)),
        _characters("characters, LSTM", None),
        _characters("characters, LSTM, memory=64", 64),
    ]


def trained(task: Task, seed: int, stabilized: bool) -> tuple[float, str]:
    """The score after training, and which remedies acted on the site."""
    torch.manual_seed(seed)
    model = task.build()
    optimizer = torch.optim.Adam(model.parameters(), lr=task.rate)
    batches = task.batches(seed)
    real = batches[0][1].is_floating_point()
    loss: Any = nn.MSELoss() if real else nn.CrossEntropyLoss()
    applied = ""
    if stabilized:
        report = rnnguard.stabilize(
            model, optimizer, batches, loss=loss, memory=task.memory, trial=False
        )
        kept = [c.remedy for c in report.changes if c.outcome == "applied" and c.path is not None]
        applied = "+".join(kept) or "step tier only"
    for x, y in batches:
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
    return task.score(model), applied


def row_of(task: Task, seeds: int) -> dict[str, str]:
    """Both policies over the seeds, with the paired difference and the losing seeds."""
    started = time.perf_counter()
    plain = [trained(task, seed, stabilized=False)[0] for seed in range(seeds)]
    mended = [trained(task, seed, stabilized=True) for seed in range(seeds)]
    gains = [after - before for before, (after, _) in zip(plain, mended, strict=True)]
    return {
        "row": task.name,
        "nothing": " ".join(f"{value:.3f}" for value in plain),
        "rnnguard": " ".join(f"{value:.3f}" for value, _ in mended),
        "median_gain": f"{statistics.median(gains):+.3f}",
        "worst_gain": f"{min(gains):+.3f}",
        "losing_seeds": " ".join(str(s) for s, gain in enumerate(gains) if gain < -0.01) or "none",
        "remedies": " | ".join(sorted({applied for _, applied in mended})),
        "seconds": f"{time.perf_counter() - started:.0f}",
        "torch": torch.__version__.partition("+")[0],
        "machine": f"{platform.machine()} CPU, {torch.get_num_threads()} thread",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", default="", help="run the tasks whose name holds this")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/evidence.csv"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, dict[str, str]] = {}
    if options.output.exists():
        with options.output.open(newline="") as file:
            rows = {row["row"]: row for row in csv.DictReader(file)}
    for task in all_tasks():
        if options.only in task.name:
            rows[task.name] = row_of(task, options.seeds)
            print(*(f"{k}: {v}" for k, v in rows[task.name].items()), sep="\n  ", flush=True)
            # Written after every task, so that a stopped run keeps what it measured.
            with options.output.open("w", newline="") as file:
                writer = csv.DictWriter(file, fieldnames=list(rows[task.name]))
                writer.writeheader()
                writer.writerows(rows.values())


if __name__ == "__main__":
    main()
