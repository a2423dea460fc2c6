"""What every cell costs against torch's fused module of the same size, in the same run.

    python -m benchmarks.cells [--quick] [--only LayerNorm] [--threads 1 2] [--output FILE.csv]

Forward and backward of one layer (two where something stands between layers), input as wide as
the state. Torch's module, the cell and the loops take turns, so that all meet the same load; a
figure is the median of the ratios of one turn. "rung 0" is the cell's own plain loop, whose input
is projected for all steps at once; "naive loop" is what people write (see `naive_loops`). The row
"LSTM" is torch's module against itself: how far off a figure may be. Peak memory is the growth of
the resident set of a new process over one pass. Every row is printed, the losing ones too.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn

import rnnguard
from benchmarks.naive_loops import LOOPS, naive
from rnnguard.nn import attention_readout, between_layers, fused, recurrent_weights
from rnnguard.nn.sequences import rungs

OUTPUT = Path(__file__).parent / "results" / "cells.csv"
SIZES = ((64, 32, 128), (128, 32, 100), (128, 16, 400), (256, 32, 200), (512, 64, 100))
MEMORY_LIMIT = 1.5
TIME = "time of forward and backward"
_SAME = ("torch", "machine")

Row = dict[str, str]
Size = tuple[int, int, int]


@dataclass(frozen=True)
class Case:
    """A cell, torch's module that it is measured against, and the most that it may cost."""

    build: Callable[..., nn.RNNBase]
    against: type[nn.RNNBase]
    limit: Callable[[int], float]
    layers: int = 1
    loop: bool = False
    """Whether the cell's rung 0 is measured too."""


def _class_a(hidden: int) -> float:
    return 1.10


def _free(hidden: int) -> float:
    return float("inf")


def _fused(kind: type[nn.RNNBase], **parts: Any) -> Callable[..., nn.RNNBase]:
    return cast(Callable[..., nn.RNNBase], partial(fused.FUSED[kind], **parts))


def cases() -> dict[str, Case]:
    """Every cell by its name."""
    between = partial(partial, between_layers.BetweenLayers)
    weights = recurrent_weights
    own = rnnguard.nn
    lstm = partial(_fused, nn.LSTM)
    return {
        "LSTM": Case(nn.LSTM, nn.LSTM, _free),
        "OutputNormLSTM": Case(own.OutputNormLSTM, nn.LSTM, _class_a),
        "LSTM, LayerNorm between layers": Case(
            lstm(between=between(norm=True)), nn.LSTM, _class_a, layers=2
        ),
        "LSTM, residual between layers": Case(
            lstm(between=between(shortcut="residual")), nn.LSTM, _class_a, layers=2
        ),
        "LSTM, highway between layers": Case(
            lstm(between=between(shortcut="highway")), nn.LSTM, _class_a, layers=2
        ),
        "LSTM, variational dropout": Case(
            lstm(between=between(dropout=0.3)), nn.LSTM, _class_a, layers=2
        ),
        "LSTM, DropConnect": Case(lstm(recurrent=weights.DropConnect), nn.LSTM, _class_a),
        "LSTM, weight norm": Case(lstm(recurrent=weights.WeightNorm), nn.LSTM, _class_a),
        "LSTM, orthogonal": Case(lstm(recurrent=weights.Orthogonal), nn.LSTM, _class_a),
        "LSTM, spectral bound": Case(lstm(recurrent=weights.SpectralBound), nn.LSTM, _class_a),
        "LSTM, attention read-out": Case(
            lstm(attention=attention_readout.AttentionReadout), nn.LSTM, _class_a
        ),
        "IndRNN": Case(own.IndRNN, nn.LSTM, lambda hidden: 0.7, loop=True),
        "LayerNormLSTM": Case(
            own.LayerNormLSTM, nn.LSTM, lambda hidden: 1.5 if hidden >= 256 else 3.0, loop=True
        ),
        "ZoneoutLSTM": Case(own.ZoneoutLSTM, nn.LSTM, _free, loop=True),
        "LayerNormGRU": Case(own.LayerNormGRU, nn.GRU, lambda hidden: 1.2, loop=True),
        "ZoneoutGRU": Case(own.ZoneoutGRU, nn.GRU, lambda hidden: 1.2, loop=True),
        "GateLastGRU": Case(own.GateLastGRU, nn.GRU, _free),
        "LayerNormRNN": Case(own.LayerNormRNN, nn.RNN, _free),
        "ResidualRNN": Case(own.ResidualRNN, nn.RNN, _free),
        "BoundedRNN": Case(own.BoundedRNN, nn.RNN, _free),
        "GatedRNN": Case(own.GatedRNN, nn.RNN, _free),
    }


def passes(module: nn.RNNBase, x: Tensor) -> None:
    """One forward and backward of a training step."""
    module.zero_grad()
    y, _ = module(x)
    y.sum().backward()


def on_rung_0(module: nn.RNNBase, x: Tensor) -> None:
    """The same through the cell's own differentiable loop."""
    with mock.patch.object(rungs, "_followed_by_others", lambda: True):
        passes(module, x)


def naively(module: nn.RNNBase, x: Tensor) -> None:
    """The same through the loop that people write."""
    module.zero_grad()
    torch.autograd.backward(naive(module, x).sum())


def turns(
    works: Mapping[str, Callable[[], None]], seconds: float, least: int
) -> list[dict[str, float]]:
    """Times of the works, one turn after the other, after an unmeasured one.

    The naive loop, by far the slowest, takes every second turn only.
    """
    taken: list[dict[str, float]] = []
    for work in works.values():
        work()
    started = time.perf_counter()
    while len(taken) < least or time.perf_counter() - started < seconds:
        turn = {}
        for name, work in works.items():
            if name == "naive loop" and len(taken) % 2:
                continue
            before = time.perf_counter()
            work()
            turn[name] = time.perf_counter() - before
        taken.append(turn)
    return taken


def time_rows(name: str, case: Case, size: Size, quick: bool) -> Iterator[Row]:
    hidden, batch, steps = size
    torch.manual_seed(0)
    x = torch.randn(steps, batch, hidden, requires_grad=True)
    kinds: tuple[Callable[..., nn.RNNBase], ...] = (case.against, case.build)
    theirs, own = (kind(hidden, hidden, num_layers=case.layers) for kind in kinds)
    works = {"torch": partial(passes, theirs, x), "own": partial(passes, own, x)}
    if case.loop:
        works["rung 0"] = partial(on_rung_0, own, x)
    if type(own) in LOOPS:
        works["naive loop"] = partial(naively, own, x)
    found = turns(works, 0.0 if quick else 2.0, 1 if quick else 3)
    for work in [*works][1:]:
        ratio = statistics.median(turn[work] / turn["torch"] for turn in found if work in turn)
        if work == "own":
            yield _row(name, case, size, TIME, ratio, case.limit(hidden))
        else:
            yield _row(f"{name}, {work}", case, size, TIME, ratio)


def peak(name: str, size: Size) -> float:
    """Growth of the resident set in bytes over one pass, in this process.

    name: that of a case, a colon, and what is run: torch, own or naive.
    """
    kind, _, run = name.partition(":")
    case = cases()[kind]
    hidden, batch, steps = size
    torch.set_num_threads(1)
    build: Callable[..., nn.RNNBase] = case.against if run == "torch" else case.build
    module = build(hidden, hidden, num_layers=case.layers)
    work = naively if run == "naive" else passes
    work(module, torch.randn(2, batch, hidden))
    x = torch.randn(steps, batch, hidden)
    # Without this the peak of the imports would hide that of the pass.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _resident("VmRSS")
    work(module, x)
    return _resident("VmHWM") - before


def _resident(line: str) -> float:
    """A line of the process's memory in bytes: what it holds, or the most that it has held."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = next(row for row in status.splitlines() if row.startswith(line))
    return 1024.0 * float(found.split()[1])


def memory_rows(name: str, case: Case, size: Size) -> Iterator[Row]:
    same = (case.against, case.layers)
    first = next(kind for kind, other in cases().items() if (other.against, other.layers) == same)
    theirs = _peak_elsewhere(f"{first}:torch", size)
    own = _peak_elsewhere(f"{name}:own", size)
    yield _row(name, case, size, "peak memory", own / theirs, MEMORY_LIMIT)
    if type(case.build(1, 1, num_layers=case.layers)) in LOOPS:
        loop = _peak_elsewhere(f"{name}:naive", size)
        yield _row(f"{name}, naive loop", case, size, "peak memory", loop / theirs)


@cache
def _peak_elsewhere(name: str, size: Size) -> float:
    command = [sys.executable, "-m", "benchmarks.cells", "--peak", name, *map(str, size)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


def _row(
    name: str,
    case: Case,
    size: Size,
    figure: str,
    ratio: float,
    limit: float = float("inf"),
) -> Row:
    hidden, batch, steps = size
    bounded = limit < float("inf")
    return {
        "cell": name,
        "figure": figure,
        "against": f"nn.{case.against.__name__}",
        "layers": str(case.layers),
        "H": str(hidden),
        "B": str(batch),
        "T": str(steps),
        "threads": str(torch.get_num_threads()),
        "ratio": f"{ratio:.3g}",
        "target": f"<= {limit:g}" if bounded else "",
        "met": str(ratio <= limit) if bounded else "",
        "torch": torch.__version__.partition("+")[0],
        "machine": f"{platform.machine()} CPU",
    }


def rows(quick: bool, only: str = "", threads_wanted: Sequence[int] = (1, 2)) -> Iterator[Row]:
    sizes = ((8, 2, 5),) if quick else SIZES
    for threads in threads_wanted[:1] if quick else threads_wanted:
        torch.set_num_threads(threads)
        for name, case in cases().items():
            if only not in name:
                continue
            for size in sizes:
                yield from time_rows(name, case, size, quick)
    if quick:
        return
    torch.set_num_threads(1)
    for name, case in cases().items():
        if only in name:
            for size in SIZES[-2:]:  # of smaller ones the process itself takes more
                yield from memory_rows(name, case, size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--only", default="", help="cells whose name holds this")
    parser.add_argument("--threads", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        name, *size = options.peak
        print(peak(name, tuple(map(int, size))))  # type: ignore[arg-type]
        return
    with options.output.open("w", newline="", encoding="utf-8") as file:
        writer = None
        for row in rows(options.quick, options.only, options.threads):
            writer = writer or csv.DictWriter(file, list(row))
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)
            file.flush()
            print(" | ".join(value for key, value in row.items() if key not in _SAME), flush=True)


if __name__ == "__main__":
    main()
