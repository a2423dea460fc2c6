"""How a recurrence of rnnguard steps, and the products with the Jacobian of its step.

Such a module tells its own step, so that what is measured is what it computes. The products are
autograd's, of the one step: exact, and the same for every cell there is.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from rnnguard.inspection.gates import Weights, weights_of
from rnnguard.records import Direction

State = tuple[Tensor, ...]
Named = dict[str, Tensor]


@dataclass(frozen=True)
class Stepping:
    """One layer in one direction: state (B, n) each after a step from x (B, F) and a state.

    gates: (B, H) each, by torch's names. drive: what x (T, B, F) adds to the pre-activations.
    keep_bias: (H,), what the keep gate's offset is where it lies in no bias of torch's.
    """

    step: Callable[[Tensor, State], State]
    gates: Callable[[Tensor, State], Named]
    drive: Callable[[Tensor], Tensor]
    keep_bias: Tensor | None = None

    def push(self, tangents: Tensor, x: Tensor, state: State) -> Tensor:
        """J v for tangents (B, k, n), at one x (B, F) and state."""
        x, state = _repeated(x, tangents), tuple(_repeated(s, tangents) for s in state)
        _prepare_forward_mode()
        dual: Any = forward_ad
        with dual.dual_level():
            parts = zip(state, _parts(tangents, state), strict=True)
            duals = tuple(dual.make_dual(s, v) for s, v in parts)
            moved = [dual.unpack_dual(s).tangent for s in self.step(x, duals)]
        found = [torch.zeros_like(s) if v is None else v for s, v in zip(state, moved, strict=True)]
        return torch.cat(found, -1).view_as(tangents)

    def pull(self, cotangents: Tensor, x: Tensor, state: State) -> Tensor:
        """Transposed J times cotangents (B, k, n), at one x (B, F) and state."""
        x = _repeated(x, cotangents)
        with torch.enable_grad():
            leaves = tuple(_repeated(s, cotangents).requires_grad_() for s in state)
            after = self.step(x, leaves)
            given = _parts(cotangents, state)
            ends = [(s, g) for s, g in zip(after, given, strict=True) if s.requires_grad]
            found = torch.autograd.grad(
                [s for s, _ in ends], leaves, [g for _, g in ends], materialize_grads=True
            )
        return torch.cat(found, -1).view_as(cotangents)


class OwnRecurrence:
    """What the probe asks a recurrent module of rnnguard; as it stands, torch's own would say."""

    def weights_used(self, layer: int, way: Direction) -> Weights:
        """The weights as the recurrence uses them."""
        assert isinstance(self, nn.Module)
        return weights_of(self, layer, way)

    def stepping(self, layer: int, way: Direction) -> Stepping | None:
        """How the layer steps outside of training; None: as torch's own, with these weights."""
        return None

    def starting(self, state: State) -> State:
        """What is carried from step to step, from the state that the module is called with."""
        return state

    def above(self, layer: int, fed: Tensor, output: Tensor) -> Tensor:
        """What the next layer is fed, from what this one was fed and gave; (T, B, n) each."""
        return output


def _repeated(rows: Tensor, vectors: Tensor) -> Tensor:
    """Each row (B, n) once for each of its vectors (B, k, m): (B k, n)."""
    return rows.repeat_interleave(vectors.shape[1], 0)


def _parts(vectors: Tensor, state: State) -> list[Tensor]:
    """Vectors (B, k, n) over the joint state, as those over each of its tensors (B k, n_i)."""
    return list(torch.split(vectors.flatten(0, 1), [s.shape[-1] for s in state], -1))


@cache
def _prepare_forward_mode() -> None:
    """Imports what torch needs for it, which warns of a deprecation of torch's own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import_module("torch._decomp.decompositions_for_jvp")
