"""What every cell costs against torch's fused module of the same size, in the same run.

    python -m benchmarks.cells [--quick] [--only LayerNorm] [--threads 1 2] [--output FILE.csv]

Forward and backward of one layer (two where something stands between layers), input as wide as
the state. Cell, torch's module and the plain Python loop take turns, so that all meet the same
load; a figure is the median of the ratios of one turn. Peak memory is the growth of the resident
set of a new process over one pass. Every row is printed, the losing ones too.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import rnnguard
from rnnguard.nn import attention_readout, between_layers, fused, recurrent_weights
from rnnguard.nn.sequences import rungs

OUTPUT = Path(__file__).parent / "results" / "cells.csv"
SIZES = ((64, 32, 128), (128, 32, 100), (128, 16, 400), (256, 32, 200), (512, 64, 100))
MEMORY_LIMIT = 1.5
_SAME = ("torch", "machine")

Row = dict[str, str]


@dataclass(frozen=True)
class Case:
    """A cell, torch's module that it is measured against, and the most that it may cost."""

    build: Callable[..., nn.RNNBase]
    against: type[nn.RNNBase]
    limit: Callable[[int], float]
    layers: int = 1
    loop: bool = False
    """Whether the plain Python loop of the same cell is measured too."""


def _class_a(hidden: int) -> float:
    return 1.10


def _free(hidden: int) -> float:
    return float("inf")


def _fused(kind: type[nn.RNNBase], **parts: Any) -> Callable[..., nn.RNNBase]:
    return partial(fused.FUSED[kind], **parts)


def cases() -> dict[str, Case]:
    """Every cell by its name."""
    between = partial(partial, between_layers.BetweenLayers)
    weights = recurrent_weights
    own = rnnguard.nn
    lstm = partial(_fused, nn.LSTM)
    return {
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


def in_a_loop(module: nn.RNNBase, x: Tensor) -> None:
    """The same through the plain differentiable loop."""
    with mock.patch.object(rungs, "_followed_by_others", lambda: True):
        passes(module, x)


def turns(works: list[Callable[[], None]], seconds: float, least: int) -> list[list[float]]:
    """Times of the works, one turn after the other, after an unmeasured one."""
    taken: list[list[float]] = []
    for work in works:
        work()
    started = time.perf_counter()
    while len(taken) < least or time.perf_counter() - started < seconds:
        turn = []
        for work in works:
            before = time.perf_counter()
            work()
            turn.append(time.perf_counter() - before)
        taken.append(turn)
    return taken


def time_rows(name: str, case: Case, size: tuple[int, int, int], quick: bool) -> Iterator[Row]:
    hidden, batch, steps = size
    torch.manual_seed(0)
    x = torch.randn(steps, batch, hidden, requires_grad=True)
    modules = [kind(hidden, hidden, num_layers=case.layers) for kind in (case.against, case.build)]
    works = [partial(passes, module, x) for module in modules]
    if case.loop:
        works.append(partial(in_a_loop, modules[1], x))
    found = turns(works, 0.0 if quick else 2.0, 1 if quick else 3)
    ratio = statistics.median(turn[1] / turn[0] for turn in found)
    limit = case.limit(hidden)
    yield _row(name, case, size, "time of forward and backward", ratio, limit)
    if case.loop:
        loop = statistics.median(turn[2] / turn[0] for turn in found)
        yield _row(f"{name}, plain loop", case, size, "time of forward and backward", loop)


def peak(name: str, size: tuple[int, int, int]) -> float:
    """Growth of the resident set in bytes over one pass, in this process."""
    kind, _, own = name.partition(":")
    case = cases()[kind]
    hidden, batch, steps = size
    torch.set_num_threads(1)
    module = (case.build if own else case.against)(hidden, hidden, num_layers=case.layers)
    passes(module, torch.randn(2, batch, hidden))
    x = torch.randn(steps, batch, hidden)
    # Without this the peak of the imports would hide that of the pass.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _resident("VmRSS")
    passes(module, x)
    return _resident("VmHWM") - before


def _resident(line: str) -> float:
    """A line of the process's memory in bytes: what it holds, or the most that it has held."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = next(row for row in status.splitlines() if row.startswith(line))
    return 1024.0 * float(found.split()[1])


def memory_rows(name: str, case: Case, size: tuple[int, int, int]) -> Iterator[Row]:
    own, theirs = (_peak_elsewhere(f"{name}{end}", size) for end in (":own", ""))
    yield _row(name, case, size, "peak memory", own / theirs, MEMORY_LIMIT)


def _peak_elsewhere(name: str, size: tuple[int, int, int]) -> float:
    command = [sys.executable, "-m", "benchmarks.cells", "--peak", name, *map(str, size)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


def _row(
    name: str,
    case: Case,
    size: tuple[int, int, int],
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
