"""Gives back everything that a probe may touch, bit for bit, also when the probe raises.

`deepcopy` of a user's model fails on models that keep a graph, and `train()`/`eval()` may
be the user's own, so tensors, attributes and flags are kept one by one.
"""

from __future__ import annotations

import copy
import hashlib
import random
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch
from torch import Tensor, nn

_CONTAINERS = (list, dict, set, deque)


@dataclass
class _ModuleState:
    module: nn.Module
    attributes: dict[str, Any]
    containers: dict[str, Any] = field(default_factory=dict)


class Snapshot:
    """The model's tensors, gradients, attributes and flags, and every random state."""

    def __init__(self, model: nn.Module, data: object = None) -> None:
        self._generators = _generators(data)
        self._random = _random_state(self._generators)
        self._modules = [_keep(module) for module in model.modules()]
        self._parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
        self._tensors = [(t, t.detach().clone()) for t in _state_tensors(model)]
        self._gradients = [(g, g.detach().clone()) for _, _, g in self._parameters if g is not None]

    def restore(self) -> None:
        """Puts back what was kept; harmless when nothing has changed."""
        for state in self._modules:
            _give_back(state)
        with torch.no_grad():
            for tensor, value in (*self._tensors, *self._gradients):
                if not same_bits(tensor, value):
                    tensor.copy_(value)
        for parameter, requires_grad, grad in self._parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        _restore_random(self._random, self._generators)


@contextmanager
def untouched(model: nn.Module, data: object = None) -> Iterator[None]:
    """Inside, the model may run and be differentiated; afterwards all is as before.

    Gradients are hidden inside, and are the same objects with the same bits afterwards.
    """
    snapshot = Snapshot(model, data)
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


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits, so that NaN equals NaN and 0.0 is not -0.0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(_bits(a), _bits(b.to(a.device)))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def fingerprint(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> str:
    """A hash of ids, names, classes, flags, hooks, bitwise values, optimizer and random state."""
    digest = hashlib.sha256()
    for line in (*_model_facts(model), *_optimizer_facts(optimizer), *_random_facts()):
        digest.update(line)
    return digest.hexdigest()


def _keep(module: nn.Module) -> _ModuleState:
    attributes = dict(module.__dict__)
    containers = {n: copy.copy(v) for n, v in attributes.items() if type(v) in _CONTAINERS}
    return _ModuleState(module, attributes, containers)


def _give_back(state: _ModuleState) -> None:
    """Attributes by identity; plain containers also by content, one level deep."""
    current = state.module.__dict__
    for name in [name for name in current if name not in state.attributes]:
        del current[name]
    current.update(state.attributes)
    for name, kept in state.containers.items():
        held = state.attributes[name]
        if isinstance(held, list | deque):
            held.clear()
            held.extend(kept)
        else:
            held.clear()
            held.update(kept)


def _state_tensors(model: nn.Module) -> list[Tensor]:
    """Parameters, buffers and tensors on plain attributes (hidden states), each once."""
    found: dict[int, Tensor] = {}
    for module in model.modules():
        own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        for value in (*own, *module.__dict__.values()):
            parts = value if isinstance(value, tuple | list) else (value,)
            found.update({id(part): part for part in parts if isinstance(part, Tensor)})
    return list(found.values())


def _generators(data: object) -> list[torch.Generator]:
    """The generators that a DataLoader draws its order from."""
    holders = (data, getattr(data, "sampler", None))
    found = [getattr(holder, "generator", None) for holder in holders]
    return [g for g in found if isinstance(g, torch.Generator)]


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


def _bytes(tensor: Tensor) -> bytes:
    return _bits(tensor).cpu().numpy().tobytes()


def _model_facts(model: nn.Module) -> Iterator[bytes]:
    for path, module in model.named_modules(remove_duplicate=False):
        names = sorted(module.__dict__)
        hooks = [sorted(module.__dict__[n]) for n in names if n.endswith("_hooks")]
        yield f"{path} {id(module)} {type(module)} {module.training} {names} {hooks}".encode()
        for name, value in module.__dict__.items():
            if isinstance(value, Tensor):
                yield f"{path}.{name} {id(value)}".encode() + _bytes(value)
            elif isinstance(value, int | float | str | bool):
                yield f"{path}.{name} {value!r}".encode()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        facts = f"{name} {id(parameter)} {parameter.requires_grad} {id(parameter.grad)}"
        yield facts.encode() + _bytes(parameter)
        if parameter.grad is not None and not parameter.grad.is_sparse:
            yield _bytes(parameter.grad)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        yield f"{name} {id(buffer)}".encode() + _bytes(buffer)


def _optimizer_facts(optimizer: torch.optim.Optimizer | None) -> Iterator[bytes]:
    if optimizer is None:
        return
    yield f"{id(optimizer)} {type(optimizer)} {sorted(optimizer.__dict__)}".encode()
    for group in optimizer.param_groups:
        rest = {k: v for k, v in group.items() if k != "params"}
        yield f"{id(group)} {[id(p) for p in group['params']]} {sorted(rest.items())}".encode()
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            yield f"{id(parameter)} {key}".encode()
            yield _bytes(value) if isinstance(value, Tensor) else repr(value).encode()


def _random_facts() -> Iterator[bytes]:
    yield _bytes(torch.get_rng_state())
    yield repr(random.getstate()).encode()
    yield repr(numpy.random.get_state()).encode()
