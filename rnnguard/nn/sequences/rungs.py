"""Which rung a sequence runs on, and how the fast one stands in autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rnnguard.nn.sequences.packing import emptied, filled, in_slots, tensors_in
from rnnguard.nn.sequences.precision import half_precision, in_halves, without_autocast

CHUNK = 16  # steps whose coefficients are held at once: enough for large products, little memory

Call = TypeVar("Call", bound=tuple[Any, ...])
Tensors = tuple[Tensor, ...]
Left = tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Rungs(Generic[Call]):
    """One recurrence twice: plain, and as a forward and its backward derived by hand.

    A call is a named tuple of everything given, x first. `forward` gives the outputs and what
    `backward` needs besides the call; `backward` gives a call's gradients in the call's form,
    None where the last argument, again in that form, says that none is wanted.
    """

    plain: Callable[[Call], Tensors]
    forward: Callable[[Call], tuple[Tensors, Left]]
    backward: Callable[[Call, Left, Tensors, Call], Call]


def climb(rungs: Rungs[Call], call: Call, weight: Tensor, kept: Iterable[Tensor | None]) -> Tensors:
    """The call's outputs on the highest rung that is right for it; RuntimeError without a step.

    `weight` tells the dtype of the products, `kept` what the fast rung gives no gradient for.
    """
    x: Tensor = call[0]
    if x.shape[0] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    half = half_precision(x, weight)
    if half is None:
        return _on_rung(rungs, call, kept)
    with without_autocast(x):
        outputs = _on_rung(rungs, in_halves(call, half), kept)
        return tuple(output.to(half) for output in outputs)


def _on_rung(rungs: Rungs[Call], call: Call, kept: Iterable[Tensor | None]) -> Tensors:
    if _followed_by_others() or any(share is not None and share.requires_grad for share in kept):
        return rungs.plain(call)
    tensors = tuple(tensors_in(call))
    if not _fit(tensors):
        return rungs.plain(call)
    outputs: Tensors = _Fast.apply(rungs, emptied(call), *tensors)  # type: ignore[no-untyped-call]
    return outputs


def _followed_by_others() -> bool:
    """Whether someone needs operations to follow: compile, export, vmap and more."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or forward_ad._current_level >= 0
    )


def _batched(tensor: Tensor) -> bool:
    """Whether autograd.grad(..., is_grads_batched=True) gave it."""
    functorch = torch._C._functorch
    return functorch.is_legacy_batchedtensor(tensor) or functorch.is_batchedtensor(tensor)


def _fit(tensors: Sequence[Tensor]) -> bool:
    """Whether these are torch's own tensors, real and of one dtype (in halves: with float32)."""
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1:
        dtypes.discard(torch.float32)
        halves = dtypes in ({torch.float16}, {torch.bfloat16})
    else:
        halves = False
    fit = halves or dtypes in ({torch.float32}, {torch.float64})
    return fit and all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors)


class _Fast(torch.autograd.Function):
    """Rung 1; what asks for more than first derivatives goes back to rung 0."""

    @staticmethod
    def forward(ctx: Any, rungs: Rungs[Any], blank: Any, *tensors: Tensor) -> Tensors:
        outputs, left = rungs.forward(filled(blank, iter(tensors)))
        # Saved, not held: a change of any of them before the backward is an error.
        ctx.save_for_backward(*tensors, *left)
        ctx.rungs, ctx.blank, ctx.given = rungs, blank, len(tensors)
        return outputs

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # asked for once: a checkpoint computes them anew each time
        tensors, left = saved[: ctx.given], saved[ctx.given :]
        call = filled(ctx.blank, iter(tensors))
        with without_autocast(tensors[0]):
            if torch.is_grad_enabled() or _followed_by_others() or any(map(_batched, cotangents)):
                return (None, None, *_through(ctx.rungs.plain, call, tensors, cotangents))
            wanted = filled(ctx.blank, iter(ctx.needs_input_grad[2:]))
            gradients = ctx.rungs.backward(call, left, cotangents, wanted)
        return (None, None, *in_slots(ctx.blank, gradients))


def _through(
    plain: Callable[[Any], Tensors], call: Any, tensors: Tensors, cotangents: Tensors
) -> list[Tensor | None]:
    """The gradients by rung 0, differentiable again where that is asked for."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        outputs = plain(call)
    places = [place for place, tensor in enumerate(tensors) if tensor.requires_grad]
    found = torch.autograd.grad(
        outputs,
        [tensors[place] for place in places],
        cotangents,
        create_graph=again,
        allow_unused=True,
    )
    gradients: list[Tensor | None] = [None] * len(tensors)
    for place, gradient in zip(places, found, strict=True):
        gradients[place] = gradient
    return gradients


def chunks(steps: int) -> Iterator[slice]:
    """The steps in pieces of at most CHUNK, last piece first."""
    for start in range((steps - 1) // CHUNK * CHUNK, -1, -CHUNK):
        yield slice(start, min(start + CHUNK, steps))


def earlier(dy: Tensor, piece: slice) -> Tensors:
    """The outputs' cotangents one step before each step of the piece; zero before the first."""
    before = dy[piece.start - 1] if piece.start else torch.zeros_like(dy[0])
    return before, *dy[piece].unbind(0)[:-1]
