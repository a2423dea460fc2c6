"""What every cell costs against torch's fused module of the same size, in the same run.

    python -m benchmarks.cells [--quick] [--only LayerNorm] [--threads 1 2] [--output FILE.csv]
    python -m benchmarks.cells --device cuda [--precision fp32 tf32 bf16 fp16]

Forward and backward of one layer (two where something stands between layers), input as wide as
the state. Torch's module, the cell and the loops take turns, so that all meet the same load; a
figure is the median of the ratios of one turn. "rung 0" is the cell's own plain loop, whose input
is projected for all steps at once; "naive loop" is what people write (see `naive_loops`). The row
"LSTM" is torch's module against itself: how far off a figure may be. Peak memory is the growth of
the resident set of a new process over one pass, on a GPU that of its allocator. bf16 and fp16 are
autocast. Every row is printed, the losing ones too.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.cell_cases import HERE, PRECISIONS, Case, Place, cases
from benchmarks.naive_loops import LOOPS, naive
from rnnguard.nn.sequences import rungs

OUTPUT = Path(__file__).parent / "results" / "cells.csv"
SIZES = ((64, 32, 128), (128, 32, 100), (128, 16, 400), (256, 32, 200), (512, 64, 100))
MEMORY_LIMIT = 1.5
TIME = "time of forward and backward"
_SAME = ("torch", "machine")

Row = dict[str, str]
Size = tuple[int, int, int]


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
    works: Mapping[str, Callable[[], None]], seconds: float, least: int, place: Place = HERE
) -> list[dict[str, float]]:
    """Times of the works, one turn after the other, after an unmeasured one.

    The naive loop, by far the slowest, takes every second turn only.
    """
    taken: list[dict[str, float]] = []
    for work in works.values():
        work()
    place.wait()
    started = time.perf_counter()
    while len(taken) < least or time.perf_counter() - started < seconds:
        turn = {}
        for name, work in works.items():
            if name == "naive loop" and len(taken) % 2:
                continue
            before = time.perf_counter()
            work()
            place.wait()
            turn[name] = time.perf_counter() - before
        taken.append(turn)
    return taken


def time_rows(name: str, case: Case, size: Size, quick: bool, place: Place = HERE) -> Iterator[Row]:
    hidden, batch, steps = size
    torch.manual_seed(0)
    x = torch.randn(steps, batch, hidden, device=place.device, requires_grad=True)
    kinds: tuple[Callable[..., nn.RNNBase], ...] = (case.against, case.build)
    made = {"num_layers": case.layers, "device": place.device}
    theirs, own = (kind(hidden, hidden, **made) for kind in kinds)
    works = {"torch": partial(passes, theirs, x), "own": partial(passes, own, x)}
    if case.loop:
        works["rung 0"] = partial(on_rung_0, own, x)
    if type(own) in LOOPS:
        works["naive loop"] = partial(naively, own, x)
    with place.entered():
        found = turns(works, 0.0 if quick else 2.0, 1 if quick else 3, place)
    for work in [*works][1:]:
        ratio = statistics.median(turn[work] / turn["torch"] for turn in found if work in turn)
        if work == "own":
            yield _row(name, case, size, TIME, ratio, case.limit(hidden), place)
        else:
            yield _row(f"{name}, {work}", case, size, TIME, ratio, place=place)


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


def peak_on_gpu(case: Case, own: bool, size: Size, place: Place) -> float:
    """The most that the GPU's allocator held over one pass, in bytes."""
    hidden, batch, steps = size
    build: Callable[..., nn.RNNBase] = case.build if own else case.against
    module = build(hidden, hidden, num_layers=case.layers, device=place.device)
    x = torch.randn(steps, batch, hidden, device=place.device)
    with place.entered():
        passes(module, x)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        passes(module, x)
    return float(torch.cuda.max_memory_allocated() - before)


def memory_rows_on_gpu(name: str, case: Case, size: Size, place: Place) -> Iterator[Row]:
    own, theirs = (peak_on_gpu(case, mine, size, place) for mine in (True, False))
    yield _row(name, case, size, "peak memory", own / theirs, MEMORY_LIMIT, place)


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
    place: Place = HERE,
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
        "precision": place.precision,
        "ratio": f"{ratio:.3g}",
        "target": f"<= {limit:g}" if bounded else "",
        "met": str(ratio <= limit) if bounded else "",
        "torch": torch.__version__.partition("+")[0],
        "machine": place.machine,
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


def rows_on_gpu(precisions: Sequence[str], only: str = "", quick: bool = False) -> Iterator[Row]:
    for precision in precisions:
        place = Place("cuda", precision)
        for name, case in cases().items():
            if only not in name:
                continue
            for size in ((8, 2, 5),) if quick else SIZES:
                yield from time_rows(name, case, size, quick, place)
                yield from memory_rows_on_gpu(name, case, size, place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    parser.add_argument("--only", default="", help="cells whose name holds this")
    parser.add_argument("--threads", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        name, *size = options.peak
        print(peak(name, tuple(map(int, size))))  # type: ignore[arg-type]
        return
    with options.output.open("w", newline="", encoding="utf-8") as file:
        writer = None
        found = rows(options.quick, options.only, options.threads)
        if options.device == "cuda":
            found = rows_on_gpu(options.precision, options.only, options.quick)
        for row in found:
            writer = writer or csv.DictWriter(file, list(row))
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)
            file.flush()
            print(" | ".join(value for key, value in row.items() if key not in _SAME), flush=True)


if __name__ == "__main__":
    main()
