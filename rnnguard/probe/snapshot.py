"""Gives back everything that a probe may touch, bit for bit, also when the probe raises.

`deepcopy` of a user's model fails on models that keep a graph, and `train()`/`eval()` may
be the user's own, so whatever the model holds is kept one by one.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rnnguard.probe.holdings import fact, keeper, same_bits
from rnnguard.probe.reachable import generators, mutables

__all__ = ["Snapshot", "fingerprint", "moved", "same_bits", "untouched"]


class Snapshot:
    """All that model, optimizer and `others` hold, and every random state.

    `others` are what else takes part in a run, such as a scheduler or a GradScaler; tensors in
    `leaving` are left as they will be.
    """

    def __init__(
        self,
        model: nn.Module,
        data: object = None,
        optimizer: object = None,
        others: Iterable[object] = (),
        leaving: Iterable[Tensor] = (),
    ) -> None:
        left = {id(tensor) for tensor in leaving}
        self._generators = generators(data)
        self._random = _random_state(self._generators)
        held = mutables(model, optimizer, *others)
        self._keepers = [keeper(each) for each in held if id(each) not in left]

    def restore(self) -> None:
        """Puts back what was kept; harmless when nothing has changed.

        An interrupt from the keyboard waits until all is back.
        """
        interrupt: KeyboardInterrupt | None = None
        while True:
            try:
                self._give_back()
                break
            except KeyboardInterrupt as caught:
                interrupt = caught
        if interrupt is not None:
            raise interrupt

    def _give_back(self) -> None:
        _restore_random(self._random, self._generators)
        for give_back in self._keepers:
            give_back()


@contextmanager
def untouched(
    model: nn.Module, data: object = None, optimizer: Optimizer | None = None
) -> Iterator[None]:
    """Inside, the model may run and be differentiated; afterwards all is as before.

    Gradients are hidden inside, and are the same objects with the same bits afterwards.
    """
    snapshot = Snapshot(model, data, optimizer)
    try:
        for parameter in model.parameters():
            parameter.grad = None
        # cuDNN has no double backward and refuses backward in eval mode (pytorch #5878).
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.backends.cudnn.flags(enabled=False),
        ):
            yield
    finally:
        snapshot.restore()


@contextmanager
def moved(parameters: Iterable[Tensor], share: float) -> Iterator[None]:
    """Inside, the parameters have other values, by a share of their rms; in `untouched`.

    A graph that the model keeps of an earlier run does not notice.
    """
    held = [(p, p.detach().clone()) for p in parameters if p.is_floating_point()]
    try:
        for parameter, values in held:
            size = float(values.norm()) / max(1, values.numel()) ** 0.5
            parameter.data.add_(torch.randn_like(values), alpha=share * (size or 1.0))
        yield
    finally:
        for parameter, values in held:
            parameter.data.copy_(values)


@contextmanager
def scaled_rates(optimizer: Optimizer, factor: float) -> Iterator[None]:
    """Inside, every step takes that part of each group's own rate, whatever else scales it."""
    groups = optimizer.param_groups
    before = [group["lr"] for group in groups]

    def scale(*_: Any) -> None:
        for group, rate in zip(groups, before, strict=True):
            group["lr"] = rate * factor

    # Once more within the step, after a guard whose own schedule would multiply; it gives back
    # what it found, so that the rate at rest is scaled as well.
    hook = optimizer.register_step_pre_hook(scale)
    try:
        scale()
        yield
    finally:
        hook.remove()
        for group, rate in zip(groups, before, strict=True):
            group["lr"] = rate


def fingerprint(model: nn.Module, optimizer: Optimizer | None = None, *others: object) -> str:
    """A hash of ids, names, classes, flags, hooks, bitwise values, optimizer and random state.

    `others` are what else belongs to the run, such as a scheduler or a GradScaler.
    """
    digest = hashlib.sha256()
    for path, module in model.named_modules(remove_duplicate=False):
        digest.update(f"{path} {id(module)}".encode())
    for held in mutables(model, optimizer, *others):
        for line in fact(held):
            digest.update(line)
    for line in _random_facts():
        digest.update(line)
    return digest.hexdigest()


def _random_state(generators: list[torch.Generator]) -> tuple[Any, ...]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    own = [generator.get_state() for generator in generators]
    return torch.get_rng_state(), cuda, numpy.random.get_state(), random.getstate(), own


def _restore_random(state: tuple[Any, ...], generators: list[torch.Generator]) -> None:
    cpu, cuda, numpy_state, python_state, own = state
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)
    numpy.random.set_state(numpy_state)
    random.setstate(python_state)
    for generator, value in zip(generators, own, strict=True):
        generator.set_state(value)


def _random_facts() -> Iterator[bytes]:
    yield torch.get_rng_state().numpy().tobytes()
    yield repr(random.getstate()).encode()
    yield repr(numpy.random.get_state()).encode()
