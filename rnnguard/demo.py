"""The story of `rnnguard demo`: a tanh RNN on real handwritten digits, before and after."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import rnnguard

Batch = tuple[Tensor, Tensor]

HIDDEN = 64
CLASSES = 10
BATCH = 64
RATE = 2e-3
STEPS = 400
INTRODUCTION = """\
A tanh RNN reads {count} handwritten digits pixel by pixel ({steps} steps).
Two equal copies are built; one gets
  rnnguard.stabilize(model, optimizer, batches, loss=CrossEntropyLoss())
"""


class DigitReader(nn.Module):
    """Reads a digit pixel by pixel and names it after the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(1, HIDDEN, batch_first=True)
        self.head = nn.Linear(HIDDEN, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.rnn(x)
        logits: Tensor = self.head(out[:, -1])
        return logits


def digit_sequences() -> tuple[Batch, Batch]:
    """scikit-learn's digits for training (1437) and held out (360); inputs are (B, 64, 1)."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, digits = load_digits(return_X_y=True)
    split = train_test_split(pixels / 16, digits, test_size=360, random_state=0)
    x, held_out_x, y, held_out_y = map(torch.as_tensor, split)
    return (x.float().unsqueeze(-1), y), (held_out_x.float().unsqueeze(-1), held_out_y)


def drawn_batches(examples: Batch, count: int, seed: int) -> list[Batch]:
    """The same `count` batches for the same seed, drawn with replacement."""
    generator = torch.Generator().manual_seed(seed)
    x, y = examples
    picks = (torch.randint(len(x), (BATCH,), generator=generator) for _ in range(count))
    return [(x[pick], y[pick]) for pick in picks]


def built(seed: int) -> tuple[DigitReader, torch.optim.Adam]:
    """Model and optimizer, with the same weights for the same seed."""
    # Layers draw their weights from the global generator, which is the caller's own.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitReader()
    return model, torch.optim.Adam(model.parameters(), lr=RATE)


def train_(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[Batch]) -> None:
    """A plain training loop; it does not know whether the optimizer is guarded."""
    for x, y in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


@contextmanager
def one_thread() -> Iterator[None]:
    """Runs torch on one thread for a while."""
    # So small a model gains nothing from a second one; where cores are shared, the two wait for
    # each other at every step, which made the demo more than ten times slower.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def accuracy(model: nn.Module, examples: Batch) -> float:
    """Share of the examples that the model names rightly."""
    x, y = examples
    return float((model(x).argmax(-1) == y).double().mean())


@one_thread()
def run(seed: int = 0, output: Path | None = None, *, steps: int = STEPS) -> None:
    """Stabilizes one of two equal models, trains both on the same batches, shows the difference.

    output: where the HTML report goes, by default rnnguard-demo.html in the current folder.
    """
    console, page = Console(), output or Path("rnnguard-demo.html")
    train, held_out = digit_sequences()
    batches = drawn_batches(train, steps, seed)
    console.print(INTRODUCTION.format(count=len(train[0]), steps=train[0].shape[1]))

    pairs = {"untouched": built(seed), "stabilized": built(seed)}
    model, optimizer = pairs["stabilized"]
    report = rnnguard.stabilize(model, optimizer, batches, loss=nn.CrossEntropyLoss(), seed=seed)
    report.to_html(page)
    console.print(report, f"\nThe same report with its figures drawn: {page}\n", sep="\n")

    scores = {}
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        for name, (model, optimizer) in pairs.items():
            train_(model, optimizer, progress.track(batches, description=f"training, {name}"))
            scores[name] = accuracy(model, held_out), _mean_loss(model, batches[-20:])
    console.print(_scoreboard(scores, steps))
    console.print(verdict(scores["untouched"][0], scores["stabilized"][0], len(held_out[0])))


@torch.no_grad()
def _mean_loss(model: nn.Module, batches: Sequence[Batch]) -> float:
    losses = [nn.functional.cross_entropy(model(x), y) for x, y in batches]
    return float(torch.stack(losses).mean())


def _scoreboard(scores: dict[str, tuple[float, float]], steps: int) -> Table:
    table = Table(title=f"After {steps} training steps on the same batches", title_justify="left")
    table.add_column("model")
    table.add_column("held-out digits named rightly", justify="right")
    table.add_column("training loss", justify="right")
    for name, (share, loss) in scores.items():
        table.add_row(name, f"{share:.1%}", f"{loss:.3f}")
    return table


def verdict(before: float, after: float, count: int) -> str:
    """What came of it, whichever way it went; two standard errors count as a difference."""
    pooled = (before + after) / 2
    noise = 2 * (2 * pooled * (1 - pooled) / count) ** 0.5
    points = f"{abs(after - before) * 100:.1f} points"
    if abs(after - before) <= noise:
        return f"No clear difference: {points} apart on {count} digits, within chance."
    return f"The stabilized model names {points} {'more' if after > before else 'fewer'} rightly."
