"""Runs of the model that differ only by what went in: noise held still, state given back."""

from __future__ import annotations

import random
from functools import wraps
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from rnnguard.inspection.batches import Batch, cloned
from rnnguard.inspection.recording import tensors_in
from rnnguard.probe.snapshot import untouched
from rnnguard.probe.subject import Subject

ROUNDING = 1e-5  # of the largest value; two runs of one function differ by less


def hold_still(model: nn.Module) -> None:
    """Turns torch's own dropouts off and its norms to their running figures; in `untouched`."""
    for module in model.modules():
        if isinstance(module, _DropoutNd | _NormBase | nn.RNNBase):
            module.training = False


def reseed(seed: int) -> None:
    """The same noise for the next run, whatever of the three it is drawn from; in `untouched`."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)


def as_called(subject: Subject, index: int) -> Batch | None:
    """A batch as the model itself is called on it; None where a step calls it not just once."""
    batches, model = subject.batches, subject.model
    batch = cloned(batches.batches[index])
    if batches.step is None:
        return Batch(batch.args, batch.kwargs, batch.target, batch.raw)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    forward = model.forward

    @wraps(forward)
    def watched(*args: Any, **kwargs: Any) -> Any:
        calls.append(cloned((args, kwargs)))
        return forward(*args, **kwargs)

    with untouched(model, optimizer=subject.optimizer):
        reseed(subject.seed)
        vars(model)["forward"] = watched
        batches.forward(model, batch)
    if len(calls) != 1:
        return None
    pair = isinstance(batch.raw, tuple | list) and len(batch.raw) == 2
    return Batch(*calls[0], batch.raw[1] if pair else None, batch.raw)


@torch.no_grad()
def answer(subject: Subject, batch: Batch, *, noise: int = 0) -> Any:
    """What the model gives on the batch, from the state it is in, which it keeps.

    With equal `noise` two runs draw the same numbers.
    """
    with untouched(subject.model, optimizer=subject.optimizer), torch.no_grad():
        hold_still(subject.model)
        reseed(subject.seed + noise)
        return cloned(subject.model(*batch.args, **cloned(batch.kwargs)))


def is_noisy(subject: Subject, batch: Batch, known: Any) -> bool:
    """Whether the output, `known` for one random state, is another for another one."""
    runs = [list(tensors_in(output)) for output in (known, answer(subject, batch, noise=1))]
    return len(runs[0]) != len(runs[1]) or any(map(differ, *runs))


def differ(first: Tensor, second: Tensor) -> bool:
    """Whether two results of one shape are apart by more than rounding."""
    if first.shape != second.shape:
        return True
    a, b = first.detach().double(), second.detach().double()
    apart = (a - b).abs().nan_to_num(0.0)
    unlike = a.isnan() != b.isnan()
    scale = max(float(a.abs().nan_to_num(0.0).amax()), 1e-30) if a.numel() else 1.0
    return bool((apart > ROUNDING * scale).any()) or bool(unlike.any())
