"""The work of every stage on one run, where worker processes can import it by name."""

from __future__ import annotations

from benchmarks.diagnosis import peers, verdicts
from benchmarks.diagnosis.first_steps import first_steps
from benchmarks.diagnosis.ledger import Row
from benchmarks.diagnosis.training import Run, trained


def train(run: Run) -> Row:
    """The outcome of one run as a row."""
    return trained(run).row()


def judge_by_peers(run: Run) -> Row:
    """Every peer's excess on one run as a row."""
    found = {name: f"{value:.4g}" for name, value in peers.judged(first_steps(run)).items()}
    return {"task": run.task, "mutation": run.mutation, "seed": str(run.seed)} | found


WORK = {
    "train": ("outcomes.csv", train),
    "peers": ("peers.csv", judge_by_peers),
    "judge": ("verdicts.csv", verdicts.judged),
}
