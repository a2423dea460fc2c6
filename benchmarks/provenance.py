"""How often fresh weights are taken for trained ones, and trained ones for fresh.

    python benchmarks/provenance.py [--quick] [--output FILE.csv]

Fresh draws of each cell, size and initialisation give the rate of false alarms; the power is that
after some steps of training whose optimizer is thrown away, so that the weights alone tell. Each
model is judged as it is, and rounded to bfloat16 as half-precision checkpoints are. Intervals are
Wilson's, of 95 %.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adam, Optimizer

from rnnguard.inspection.provenance import provenance_of
from rnnguard.remedies.chrono_bias import CHRONO_BIAS
from rnnguard.remedies.critical_gain import CRITICAL_GAIN
from rnnguard.remedies.orthogonal import ORTHOGONAL
from rnnguard.remedies.variance_scaling import VARIANCE_SCALING
from rnnguard.rewrite.edit import Edit

OUTPUT = Path(__file__).parent / "results" / "provenance.csv"
INPUTS, STEPS, BATCH = 16, 8, 16
CELLS: dict[str, type[nn.RNNBase]] = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}


@dataclass(frozen=True)
class Size:
    """How many fresh draws and trained models of a size, and after which steps these are judged."""

    hidden: int
    fresh: int
    trained: int
    marks: tuple[int, ...]
    long: int = 0
    cells: tuple[str, ...] = tuple(CELLS)


SIZES = (
    Size(8, 400, 8, (1, 10, 100), 1),
    Size(16, 400, 8, (1, 10, 100)),
    Size(32, 400, 8, (1, 10, 100), 1),
    Size(64, 300, 4, (1, 10, 100)),
    Size(128, 100, 3, (1, 10, 100)),
    Size(256, 30, 1, (1, 10, 100)),
    Size(512, 10, 1, (1, 10)),
    Size(1024, 5, 1, (1,)),
)
QUICK = (Size(8, 3, 1, (1, 3), cells=("gru",)),)
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "SGD 0.1": lambda parameters: SGD(parameters, lr=0.1),
    "SGD 0.01": lambda parameters: SGD(parameters, lr=0.01),
    "Adam 1e-3": lambda parameters: Adam(parameters, lr=1e-3),
}
HEADS = ("none", "linear", "norm and linear")


def _default(module: nn.RNNBase) -> None:
    """As torch leaves it."""


@torch.no_grad()
def _keras(module: nn.RNNBase) -> None:
    """Glorot input kernels, the recurrent one orthogonal as a whole, forget bias one."""
    for name, parameter in module.named_parameters():
        if "weight_ih" in name:
            nn.init.xavier_uniform_(parameter)
        elif "weight_hh" in name:
            nn.init.orthogonal_(parameter)
        else:
            nn.init.zeros_(parameter)
    _forget_bias(module)


@torch.no_grad()
def _orthogonal(module: nn.RNNBase) -> None:
    """Orthogonal gate by gate, forget bias one, the rest as torch leaves it."""
    for block in module.get_parameter("weight_hh_l0").split(module.hidden_size):
        nn.init.orthogonal_(block)
    _forget_bias(module)


def _forget_bias(module: nn.RNNBase) -> None:
    if isinstance(module, nn.LSTM):
        module.get_parameter("bias_ih_l0")[module.hidden_size : 2 * module.hidden_size] = 1.0


def _remedies(module: nn.RNNBase) -> None:
    """Every value that rnnguard may write: orthogonal and scaled, chrono biases, input weights."""
    dose = {"seed": int(torch.randint(1000, ())), "t_max": 100, "input_rms": 2.0, "factor": 1.2}
    for remedy in (ORTHOGONAL, CHRONO_BIAS, VARIANCE_SCALING, CRITICAL_GAIN):
        remedy.apply(Edit(module, None), module, dose)


def _scaled(module: nn.RNNBase) -> None:
    CRITICAL_GAIN.apply(Edit(module, None), module, {"factor": 1.37})


INITS: dict[str, Callable[[nn.RNNBase], None]] = {
    "default": _default,
    "keras": _keras,
    "orthogonal": _orthogonal,
    "remedies": _remedies,
    "scaled default": _scaled,
}


class Reader(nn.Module):
    """A recurrence with what reads it: nothing, a linear layer, or a normalisation before that."""

    def __init__(self, cell: str, hidden: int, init: str, head: str) -> None:
        super().__init__()
        self.rnn = CELLS[cell](INPUTS, hidden)
        INITS[init](self.rnn)
        self.norm = nn.LayerNorm(hidden) if "norm" in head else nn.Identity()
        self.head = nn.Linear(hidden, 2) if head != "none" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.rnn(x)[0][-1]))
        return out


def verdicts(model: Reader) -> dict[str, str]:
    """The verdict on the recurrence as it is, and on the same model in bfloat16."""
    exact = provenance_of(model.rnn, [model.norm, model.head]).verdict
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    coarse = provenance_of(model.bfloat16().rnn, [model.norm, model.head]).verdict
    model.float().load_state_dict(kept)
    return {"float32": exact, "bfloat16": coarse}


Row = dict[str, object]
Tally = defaultdict[tuple[str, str], list[str]]


def fresh_rows(size: Size) -> Iterator[Row]:
    """False alarms: fresh weights that do not count as untrained."""
    for cell in size.cells:
        for init in INITS:
            tally: Tally = defaultdict(list)
            for seed in range(size.fresh if "remed" not in init else min(size.fresh, 100)):
                torch.manual_seed(seed)
                for precision, verdict in verdicts(Reader(cell, size.hidden, init, "none")).items():
                    tally[precision, "0"].append(verdict)
            yield from _rows(tally, cell=cell, hidden=size.hidden, init=init, head="none")


def trained_rows(size: Size) -> Iterator[Row]:
    """Power: trained weights that do not count as untrained."""
    for cell in size.cells:
        for head in HEADS:
            for init in ("default", "keras") if head == "linear" else ("default",):
                for name in OPTIMIZERS:
                    tally: Tally = defaultdict(list)
                    for seed in range(size.trained):
                        marks = (*size.marks, 1000) if seed < size.long else size.marks
                        _train(Reader, (cell, size.hidden, init, head), name, seed, marks, tally)
                    facts = {"cell": cell, "hidden": size.hidden, "init": init, "head": head}
                    yield from _rows(tally, **facts, optimizer=name)


def _train(
    build: Callable[..., Reader],
    facts: tuple[str, int, str, str],
    optimizer: str,
    seed: int,
    marks: tuple[int, ...],
    tally: Tally,
) -> None:
    torch.manual_seed(1000 + seed)
    model = build(*facts)
    moved = OPTIMIZERS[optimizer](model.parameters())
    x = torch.randn(STEPS, BATCH, INPUTS)
    wanted = x[:4].mean((0, 2)) > 0
    for step in range(1, max(marks) + 1):
        moved.zero_grad()
        output = model(x)
        loss = (
            functional.cross_entropy(output, wanted.long())
            if facts[-1] != "none"
            else functional.mse_loss(output, wanted.float()[:, None].expand_as(output))
        )
        torch.autograd.backward(loss)
        moved.step()
        if step in marks:
            for precision, verdict in verdicts(model).items():
                tally[precision, str(step)].append(verdict)


def _rows(tally: Tally, **facts: object) -> Iterator[Row]:
    for (precision, steps), found in tally.items():
        caught = sum(verdict != "untrained" for verdict in found)
        low, high = wilson(caught, len(found))
        yield {
            **{"optimizer": "", **facts, "steps": steps, "precision": precision, "n": len(found)},
            "trained": found.count("trained"),
            "unsure": found.count("unsure"),
            "rate": f"{caught / len(found):.4f}",
            "low": f"{low:.4f}",
            "high": f"{high:.4f}",
        }


def wilson(count: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share of `count` in `n` (Wilson 1927)."""
    middle = (count + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(count * (n - count) / n + z * z / 4)
    return max(0.0, middle - half), min(1.0, middle + half)


def table(rows: list[Row]) -> str:
    """Cells, optimizers and heads pooled: false alarms and power by precision, start and size."""
    pooled: dict[tuple[str, ...], list[int]] = defaultdict(lambda: [0, 0])
    for row in rows:
        read = str(row["head"]) if row["precision"] == "bfloat16" else ""
        what = "fresh" if row["steps"] == "0" else f"{row['steps']} steps"
        key = (str(row["precision"]), str(row["init"]), what, read, str(row["hidden"]))
        pooled[key][0] += int(str(row["trained"])) + int(str(row["unsure"]))
        pooled[key][1] += int(str(row["n"]))
    return "\n".join(
        f"{' | '.join(key)} | {caught} of {n} | "
        + " to ".join(f"{edge:.1%}" for edge in wilson(caught, n))
        for key, (caught, n) in pooled.items()
    )


def main(arguments: list[str] | None = None) -> None:
    """Measures all, writes the rows as CSV and prints them pooled."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run of seconds")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    for size in QUICK if options.quick else SIZES:
        rows += [*fresh_rows(size), *trained_rows(size)]
    with options.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(table(rows))


if __name__ == "__main__":
    main()
