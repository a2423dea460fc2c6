"""Healthy models of realistic shape: that they train is a fact; so every warning is a false one."""

from __future__ import annotations

import ast
import inspect
import sys
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from models import (
    actor_critic,
    characters,
    classifier,
    forecaster,
    own_cell,
    recogniser,
    tagger,
    translator,
)

import rnnguard

STEPS = 30


class Healthy(NamedTuple):
    """A model's file, the paths of its sites, and what is left of its loss after STEPS at most."""

    code: ModuleType
    sites: set[str]
    share: float


MODELS = [
    Healthy(tagger, {"lstm"}, 0.25),
    Healthy(classifier, {"encoder"}, 0.05),
    Healthy(translator, {"encoder.gru", "cell"}, 0.7),
    Healthy(characters, {"lstm"}, 0.35),
    Healthy(recogniser, {"gru"}, 0.15),
    Healthy(actor_critic, {"cell"}, 0.25),
    Healthy(forecaster, {"lstm"}, 0.25),
    Healthy(own_cell, {"cell"}, 0.1),
]

each = pytest.mark.parametrize(
    "healthy", MODELS, ids=lambda healthy: healthy.code.__name__.removeprefix("models.")
)


@each
def test_it_trains(healthy: Healthy) -> None:
    model = healthy.code.build()
    optimizer, batches = healthy.code.optimizer(model), healthy.code.batches()
    losses = [
        float(healthy.code.train_step(model, optimizer, batches[i % len(batches)]))
        for i in range(STEPS)
    ]
    first, last = sum(losses[: len(batches)]), sum(losses[-len(batches) :])
    assert last < healthy.share * first


@each
@pytest.mark.parametrize("declared", [True, False], ids=["declared", "undeclared"])
def test_nothing_is_wrong_with_it(healthy: Healthy, declared: bool) -> None:
    code = healthy.code
    model = code.build()
    options = {"memory": code.MEMORY if declared else None, "train_step": code.train_step}
    known = inspect.signature(rnnguard.audit).parameters
    report = rnnguard.audit(
        model,
        code.optimizer(model),
        code.batches(),
        step=code.step,
        verbose=False,
        **{name: value for name, value in options.items() if name in known},
    )
    alarms = [finding for finding in report.findings if finding.severity != "info"]
    assert alarms == []
    assert {site.path for site in report.sites} == healthy.sites
    if declared:
        assert report.level == "healthy"


@each
def test_it_is_written_with_torch_alone(healthy: Healthy) -> None:
    imported: set[str] = set()
    for node in ast.walk(ast.parse(inspect.getsource(healthy.code))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").partition(".")[0])
    assert imported - sys.stdlib_module_names == {"torch"}


def test_the_windows_of_the_text_go_on_from_one_another() -> None:
    read = torch.cat([window for window, _, _ in characters.batches()], dim=1)
    told = torch.cat([following for _, following, _ in characters.batches()], dim=1)
    assert torch.equal(read[:, 1:], told[:, :-1])
    assert [begins for _, _, begins in characters.batches()] == [True, False, False]
