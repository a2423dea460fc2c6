"""Recipes that are applied blind: the one of folklore, and one drawn from a menu."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import torch
from torch import nn
from torch.optim import AdamW

from benchmarks.outcomes.models import WrittenReader
from benchmarks.outcomes.policies import Case, Prepared, clipped
from benchmarks.outcomes.starts import BLOCKS, chrono_, recurrence

STARTS = ("as it is", "orthogonal", "chrono")
CLIPS = (0.0, 1.0, 5.0)
RATES = (1 / 3, 1.0, 3.0)


@torch.no_grad()
def blind(case: Case) -> Prepared:
    """Orthogonal recurrent matrices, forget bias 1 in both vectors, clip 5, AdamW.

    As it goes round: matrices and biases are found by the names of torch's own modules, so that
    a recurrence of one's own gets the clip and the optimizer alone.
    """
    for name, parameter in case.model.named_parameters():
        if "weight_hh" in name:
            nn.init.orthogonal_(parameter)
        elif "bias_ih" in name or "bias_hh" in name:
            quarter = len(parameter) // 4
            if isinstance(recurrence(case.model), nn.LSTM):
                parameter[quarter : 2 * quarter] = 1.0
    other = replace(case, optimizer=AdamW(case.model.parameters(), lr=case.task.rate))
    return clipped(other, 5.0, "orthogonal, forget bias 1 + 1, AdamW")


def at_random(case: Case) -> Prepared:
    """Start, clip, rate and a LayerNorm or none, drawn by seed, task and model."""
    drawn = Random(f"{case.seed} {case.task.name} {case.name}")
    start, norm = drawn.choice(STARTS), drawn.choice(CLIPS)
    factor, normalised = drawn.choice(RATES), drawn.random() < 0.5
    if start == "orthogonal":
        orthogonal_(case.model)
    elif start == "chrono":
        chrono_(case.model, case.task.steps)
    for group in case.optimizer.param_groups:
        group["lr"] *= factor
    if normalised:
        put_before_head_(case, nn.LayerNorm(head_of(case.model).in_features))
    layer = ", LayerNorm" if normalised else ""
    done = f"{start}, clip {norm:g}, rate x{factor:.2g}{layer}"
    if not norm:
        return Prepared(case.model, case.optimizer, done)
    return replace(clipped(case, norm), done=done)


@torch.no_grad()
def orthogonal_(model: nn.Module) -> None:
    """Makes every gate's recurrent matrix orthogonal."""
    if isinstance(model, WrittenReader):
        weights, blocks = [model.cell.recurrent.weight], 2
    else:
        rnn = recurrence(model)
        weights = [w for name, w in rnn.named_parameters() if "weight_hh" in name]
        blocks = BLOCKS[type(rnn)]
    for weight in weights:
        for block in weight.chunk(blocks):
            nn.init.orthogonal_(block)


def head_of(model: nn.Module) -> nn.Linear:
    """The model's read-out."""
    head = model.get_submodule("head")
    assert isinstance(head, nn.Linear)
    return head


def put_before_head_(case: Case, layer: nn.Module) -> None:
    """Has the head read what the layer makes of the recurrence's output, and trains the layer."""
    case.model.register_module("head", nn.Sequential(layer, head_of(case.model)))
    case.optimizer.add_param_group({"params": list(layer.parameters())})
