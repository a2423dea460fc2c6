"""What an audit and a guarded step cost, in units of what training costs on the same machine.

    python benchmarks/overhead.py [--only audit] [--quick] [--output FILE.csv]

Times are medians of repeats in one process on one thread; audit and training step alternate, so
that both meet the same load. Every row holds one figure with its target where there is one.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import math
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rnnguard
from rnnguard.rewrite.engagement import BLOCK
from rnnguard.rewrite.stepguard import GuardSettings, StepGuard

Row = dict[str, str]
Batch = tuple[Tensor, Tensor]
OUTPUT = Path(__file__).parent / "results" / "overhead.csv"
AUDIT_LIMIT = 10.0
SMALL_LIMIT = 1.0
MODEL_LIMIT = 5.0
GUARD_LIMIT = 1.05
GUARD_TARGET = f"<= {GUARD_LIMIT:g}"
FORMS: dict[str, dict[str, Any]] = {
    "norm": {"max_norm": 0.99},
    "group": {"clip": "group", "max_norm": 0.99},
    "value": {"clip": "value", "max_value": 1e-5},
    "norm, nothing to clip": {"max_norm": 1e6},
    "group, nothing to clip": {"clip": "group", "max_norm": 1e6},
    "value, nothing to clip": {"clip": "value", "max_value": 1e6},
    "percentile": {"clip": "percentile"},
    "z-score": {"clip": "z_score"},
}


class Reader(nn.Module):
    """An LSTM whose last output a linear head reads."""

    def __init__(self, inputs: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.rnn = nn.LSTM(inputs, hidden, num_layers=layers, batch_first=True)
        self.head = nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.rnn(x)
        logits: Tensor = self.head(out[:, -1])
        return logits


class Bench:
    """A model with its optimizer and batches, ready for a training step or an audit."""

    def __init__(
        self, inputs: int, hidden: int, steps: int, batch: int, layers: int = 1, count: int = 8
    ) -> None:
        torch.manual_seed(0)
        self.model = Reader(inputs, hidden, layers)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        self.loss = nn.CrossEntropyLoss()
        self.batches: list[Batch] = [
            (torch.randn(batch, steps, inputs), torch.randint(10, (batch,))) for _ in range(count)
        ]
        self.steps = steps

    def train(self) -> None:
        x, y = self.batches[0]
        self.optimizer.zero_grad()
        torch.autograd.backward(self.loss(self.model(x), y))
        self.optimizer.step()

    def audit(self, *, declared: bool, count: int | None = None) -> None:
        memory = self.steps if declared else None
        batches = self.batches[:count]
        rnnguard.audit(self.model, self.optimizer, batches, loss=self.loss, memory=memory)


def seconds(*works: Callable[[], object], repeats: int = 3) -> list[float]:
    """The median time of each work; the works alternate, after one unmeasured round."""
    taken: list[list[float]] = [[] for _ in works]
    for turn in range(repeats + 1):
        for work, times in zip(works, taken, strict=True):
            started = time.perf_counter()
            work()
            if turn:
                times.append(time.perf_counter() - started)
    return [statistics.median(times) for times in taken]


def exponent(sizes: list[int], times: list[float]) -> float:
    """The slope of log time over log size by least squares: 1 is linear."""
    x, y = [math.log(s) for s in sizes], [math.log(t) for t in times]
    mean_x, mean_y = statistics.fmean(x), statistics.fmean(y)
    above = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return above / sum((a - mean_x) ** 2 for a in x)


def _row(figure: str, value: float, unit: str, target: str = "", met: bool | None = None) -> Row:
    return {
        "figure": figure,
        "value": f"{value:.4g}",
        "unit": unit,
        "target": target,
        "met": "" if met is None else str(met),
        "torch": torch.__version__.partition("+")[0],
        "rnnguard": rnnguard.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()} CPU, {torch.get_num_threads()} thread",
    }


def audit_rows(quick: bool) -> Iterator[Row]:
    """The audit of a middling model in training steps of that very model."""
    hidden, steps, batch = (32, 32, 8) if quick else (256, 256, 32)
    bench = Bench(128, hidden, steps, batch, layers=2)
    cases = {
        "one batch, memory declared": lambda: bench.audit(declared=True, count=1),
        "eight batches, memory declared": lambda: bench.audit(declared=True),
        "eight batches, memory estimated": lambda: bench.audit(declared=False),
    }
    trained, *audited = seconds(bench.train, *cases.values(), repeats=1 if quick else 3)
    shape = f"2 layers, I=128, H={hidden}, T={steps}, B={batch}"
    yield _row(f"training step, {shape}", trained, "s")
    for name, taken in zip(cases, audited, strict=True):
        ratio = taken / trained
        yield _row(f"audit, {name}, {shape}", ratio, "training steps", f"<= {AUDIT_LIMIT:g}",
                   ratio <= AUDIT_LIMIT)  # fmt: skip


def growth_rows(quick: bool) -> Iterator[Row]:
    """How the audit grows with the steps and with the layers: the exponent of a power law."""
    lengths = [64, 128, 256] if quick else [256, 512, 1024, 2048, 4096]
    depths = [1, 2] if quick else [1, 2, 4, 8]
    found = []
    for length in lengths:
        bench = Bench(16, 32, length, 8, count=1)
        found += seconds(lambda b=bench: b.audit(declared=True), repeats=2)  # type: ignore[misc]
        yield _row(f"audit, 1 layer, H=32, B=8, T={length}", found[-1], "s")
    slope = exponent(lengths, found)
    yield _row(f"growth of the audit with T up to {lengths[-1]}", slope, "exponent", "<= 1.1",
               slope <= 1.1)  # fmt: skip
    found = []
    for depth in depths:
        bench = Bench(16, 32, 128, 8, layers=depth, count=1)
        found += seconds(lambda b=bench: b.audit(declared=True), repeats=2)  # type: ignore[misc]
        yield _row(f"audit, H=32, B=8, T=128, {depth} layers", found[-1], "s")
    slope = exponent(depths, found)
    yield _row(f"growth of the audit with layers up to {depths[-1]}", slope, "exponent", "<= 1.1",
               slope <= 1.1)  # fmt: skip


def small_rows(quick: bool) -> Iterator[Row]:
    """A small model's audit, the first one in the process and a later one."""
    bench = Bench(8, 32, 50, 16)
    started = time.perf_counter()
    bench.audit(declared=False)
    first = time.perf_counter() - started
    (later,) = seconds(lambda: bench.audit(declared=False))
    shape = "H=32, T=50, B=16, memory estimated"
    yield _row(f"first audit, {shape}", first, "s")
    yield _row(f"audit, {shape}", later, "s", f"< {SMALL_LIMIT:g}", later < SMALL_LIMIT)


class Idle(torch.optim.SGD):
    """An optimizer whose step moves nothing, so that only what hangs on the step takes time."""

    growth = 1.0

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        """Makes the gradients larger where every step is to have something to clip."""
        if self.growth != 1:
            params = (p for group in self.param_groups for p in group["params"])
            torch._foreach_mul_([p.grad for p in params], self.growth)


def model_rows(quick: bool) -> Iterator[Row]:
    """A full audit of each model of tests/models, its training step watched and 20 steps tried."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    folder = Path(__file__).parents[1] / "tests" / "models"
    names = sorted(file.stem for file in folder.glob("[!_]*.py"))
    for name in names[:1] if quick else names:
        code = importlib.import_module(f"models.{name}")
        model = code.build()
        how = {"step": code.step} if hasattr(code, "step") else {"loss": code.loss}
        how |= {"memory": code.MEMORY, "train_step": code.train_step, "trial": 20}
        audit = partial(rnnguard.audit, model, code.optimizer(model), code.batches(), **how)
        (taken,) = seconds(audit, repeats=1 if quick else 3)
        limit = f"<= {MODEL_LIMIT:g}"
        yield _row(f"full audit of models/{name}", taken, "s", limit, taken <= MODEL_LIMIT)


def guard_rows(quick: bool) -> Iterator[Row]:
    """What the guard adds to a step, in units of clip_grad_norm_ + scheduler.step()."""
    bench = Bench(32, 64, 2, 2) if quick else Bench(1400, 1024, 2, 1)
    bench.train()
    params = list(bench.model.parameters())
    count = sum(p.numel() for p in params) / 1e6
    repeats = 5 if quick else 60
    for form, clip in FORMS.items():
        guarded, bare, hand = (Idle(params, lr=1e-3) for _ in range(3))
        guarded.growth = bare.growth = 1.0 if "nothing" in form else 1.02
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(hand, 10**6)
        schedule = {"warmup": 100, "total_steps": 10**6}
        StepGuard(GuardSettings(on_nonfinite="propagate", **clip, **schedule)).install(guarded)

        def by_hand(scheduler: Any = scheduler, limit: float = clip.get("max_norm", 1.0)) -> None:
            torch.nn.utils.clip_grad_norm_(params, limit)
            scheduler.step()

        hand.step()  # a scheduler warns when it steps first
        times = paired(guarded.step, bare.step, by_hand, repeats=repeats)
        ratios = [(guard - idle) / work for guard, idle, work in times]
        middle, low, high = interval(ratios)
        name = f"guard by {form} over clip_grad_norm_ + scheduler.step()"
        yield _row(f"{name}, LSTM of {count:.1f} M", middle, "ratio", GUARD_TARGET,
                   middle <= GUARD_LIMIT)  # fmt: skip
        yield _row(f"{name}, 95 % interval from", low, "ratio")
        yield _row(f"{name}, 95 % interval to", high, "ratio")
    yield from whole_step_rows(params, repeats // 3 or 1)


def whole_step_rows(params: list[nn.Parameter], repeats: int) -> Iterator[Row]:
    """Whole steps of Adam: bare, with clip and scheduler by hand, and with the guard."""
    bare, hand, guarded = (torch.optim.Adam(params, lr=1e-9) for _ in range(3))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(hand, 10**6)
    settings = GuardSettings(max_norm=1.0, warmup=100, total_steps=10**6, on_nonfinite="propagate")
    StepGuard(settings).install(guarded)

    def by_hand() -> None:
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        hand.step()
        scheduler.step()

    times = paired(guarded.step, bare.step, by_hand, repeats=repeats)
    for name, ratios in (
        (
            "guarded Adam step over a step with clip and scheduler by hand",
            [g / h for g, _, h in times],
        ),
        ("guarded Adam step over a bare one", [g / b for g, b, _ in times]),
    ):
        middle, low, high = interval(ratios)
        yield _row(name, middle, "ratio")
        yield _row(f"{name}, 95 % interval from", low, "ratio")
        yield _row(f"{name}, 95 % interval to", high, "ratio")


def paired(*works: Callable[[], object], repeats: int) -> list[list[float]]:
    """The time of each work in each repeat, over a block of steps; the order turns each time.

    Time is that which the thread has run, so that other load on the machine counts less.
    """
    found = []
    for turn in range(-2, repeats):
        times = [0.0] * len(works)
        for place in range(len(works)):
            index = (place + turn) % len(works)
            started = time.thread_time()
            for _ in range(BLOCK):
                works[index]()
            times[index] = (time.thread_time() - started) / BLOCK
        if turn >= 0:
            found.append(times)
    return found


def interval(values: list[float]) -> tuple[float, float, float]:
    """The median, and its 95 % interval by bootstrap."""
    draws = random.Random(0)
    medians = sorted(statistics.median(draws.choices(values, k=len(values))) for _ in range(1000))
    return statistics.median(values), medians[25], medians[974]


def import_rows(quick: bool) -> Iterator[Row]:
    """Import times in a fresh interpreter, less that of the interpreter itself."""
    repeats = 1 if quick else 5

    def fresh(code: str) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, "-c", code], check=True)

    codes = ("pass", "import rnnguard", "import torch", "import rnnguard; rnnguard.audit")
    nothing, *taken = seconds(*map(fresh, codes), repeats=repeats)
    for code, found in zip(codes[1:], taken, strict=True):
        yield _row(code, 1e3 * (found - nothing), "ms")


def memory_rows(quick: bool) -> Iterator[Row]:
    """The most that tensors hold at once during an audit, against a training step and the states.

    One Jacobian per step would be a T x H x H tensor, or B of them, beside the states. The batch
    is small, since the states of a large one would hide it.
    """
    hidden, batch = (64, 2) if quick else (256, 2)
    for steps in (128, 256) if quick else (256, 1024, 4096):
        bench = Bench(16, hidden, steps, batch, count=1)
        # Imports and caches of the first audit are no part of what this one holds.
        Bench(8, 8, 8, 2, count=1).audit(declared=True)
        trained = peak_bytes(bench.train)
        audited = peak_bytes(lambda b=bench: b.audit(declared=True))  # type: ignore[misc]
        shape = f"H={hidden}, T={steps}, B={batch}"
        states, jacobians = 4 * steps * batch * hidden, 4 * steps * hidden * hidden
        yield _row(f"peak of the audit, {shape}", audited / 2**20, "MiB")
        yield _row(f"peak of the audit over a training step's, {shape}", audited / trained, "ratio")
        yield _row(f"peak over T x B x H floats, {shape}", audited / states, "ratio")
        share = audited / jacobians
        yield _row(f"peak over T x H x H floats, {shape}", share, "ratio", "< 1", share < 1)


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes that torch's allocator held at once beyond what it held before.

    The resident size would say less: freed memory stays in the process and is used again.
    """
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


PARTS: dict[str, Callable[[bool], Iterator[Row]]] = {
    "audit": audit_rows,
    "growth": growth_rows,
    "small": small_rows,
    "models": model_rows,
    "guard": guard_rows,
    "import": import_rows,
    "memory": memory_rows,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=PARTS, action="append", help="default: all parts")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, Row] = {}
    if options.output.exists():
        with options.output.open(newline="", encoding="utf-8") as file:
            rows = {row["figure"]: row for row in csv.DictReader(file)}
    for part in options.only or PARTS:
        for row in PARTS[part](options.quick):
            rows[row["figure"]] = row
            print(*list(row.values())[:5], sep=" | ", flush=True)
        with options.output.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(row))
            writer.writeheader()
            writer.writerows(rows.values())


if __name__ == "__main__":
    main()
