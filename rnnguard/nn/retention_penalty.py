"""nn.RNN on torch's kernel whose backward adds a penalty on what a step keeps of the gradient.

Pascanu, Mikolov and Bengio 2013 (arXiv 1211.5063), equations 9 and 10: with delta_t the gradient
of the loss with respect to the state and J_t the step's Jacobian, Omega is the mean over steps
and sequences of (|delta_t J_t| / |delta_t| - 1)^2. Only its immediate gradient with respect to
the recurrent matrix is taken, deltas and states held fixed. The mean and not their sum, as in
the authors' experiments, so that a weight means the same for every length.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.autograd import Function

from rnnguard.inspection.gates import parameter_name, recurrences
from rnnguard.nn.call import taken_apart
from rnnguard.nn.contract import refuse_script
from rnnguard.nn.kernel import run_layers
from rnnguard.nn.layout import Laid, laid_out
from rnnguard.nn.one_call import States, as_one_call
from rnnguard.nn.sequences.activation import ACTIVATIONS

FAINT = 1e-20  # a smaller |delta|^2 says nothing of what a step keeps
WEIGHT = 2.0


class RetentionPenalty(nn.Module):
    """The weight of the penalty, against a loss whose gradients are neither scaled nor summed."""

    def __init__(self, weight: float = WEIGHT) -> None:
        super().__init__()
        if not 0 <= weight < float("inf"):
            raise ValueError(f"weight must be finite and at least 0, got {weight}")
        self.weight = float(weight)

    def extra_repr(self) -> str:
        return f"weight={self.weight}"


class PenalizedRNN(nn.RNN):
    """nn.RNN of one layer whose recurrent gradient in training holds the penalty's as well.

    Takes what nn.RNN takes, and `weight`. Values, keys and evaluation are torch's own. The
    penalty knows no scale: a GradScaler divides it by its own. Each backward through the outputs
    adds it once, those of an accumulated step as well; a second derivative takes what the first
    one added for a constant. Traced and exported it is nn.RNN.
    """

    penalty: RetentionPenalty

    def __init__(self, *sizes: Any, weight: float = WEIGHT, **options: Any) -> None:
        super().__init__(*sizes, **options)
        if self.num_layers != 1:
            raise ValueError(f"the penalty is for one layer, not {self.num_layers}")
        self.penalty = RetentionPenalty(weight)

    def forward(self, input: Any, hx: Any = None) -> Any:
        # Compiled, a recurrence stays as it is, like torch's own.
        run = _kept_eager() if "torch._dynamo" in sys.modules else PenalizedRNN._forward
        return run(self, input, hx)

    def _forward(self, input: Any, hx: Any) -> Any:
        if not self._penalizes():
            return super().forward(input, hx)
        self._update_flat_weights()
        call = taken_apart(self, input, hx, False)
        run = partial(self._run, cast(list[Tensor], self._flat_weights), call.batch_sizes)
        return call.result(*as_one_call(self, call.rows, call.batch_sizes, call.states, run))

    def _penalizes(self) -> bool:
        wanted = self.training and self.penalty.weight > 0 and torch.is_grad_enabled()
        traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
        return wanted and not traced

    def _run(
        self, weights: list[Tensor], sizes: Tensor | None, rows: Tensor, states: States
    ) -> tuple[Tensor, States]:
        output, (last,) = run_layers(self, weights, slice(0, 1), sizes, rows, states)
        names = [parameter_name(self, "weight_hh", *place) for place in recurrences(self)]
        hhs = [weights[self._flat_weights_names.index(name)] for name in names]
        rest = (sizes, str(self.nonlinearity), self.penalty.weight)
        output, last = _Penalized.apply(output, last, *rest, *hhs)  # type: ignore[no-untyped-call]
        return output, (last,)

    def __prepare_scriptable__(self) -> NoReturn:
        """What torch.jit.script asks first."""
        refuse_script(self)


class _Penalized(Function):
    """Outputs and last states as they are; back, the recurrent weights get the penalty's gradient.

    Arguments: outputs as rows, last states (D, B, H), batch_sizes of packed rows, activation,
    weight, and the recurrent weights of the D directions.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        output: Tensor, last: Tensor, sizes: Tensor | None, phi: str, weight: float, *hhs: Tensor
    ) -> tuple[Tensor, Tensor]:
        # Copies, not views, so that a user may change them in place as torch's own.
        return output.clone(), last.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        rows, _, ctx.sizes, ctx.phi, ctx.weight, *hhs = inputs
        ctx.save_for_backward(rows, *hhs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Any, ...]:
        rows, *hhs = ctx.saved_tensors
        with torch.no_grad(), torch.autocast(rows.device.type, enabled=False):
            found = _gradients(rows, dy, dlast, ctx, hhs)
        return dy, dlast, None, None, None, *found

    @staticmethod
    def jvp(ctx: Any, dy: Tensor, dlast: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        return dy.clone(), dlast.clone()


def _gradients(
    rows: Tensor, dy: Tensor, dlast: Tensor, ctx: Any, hhs: Sequence[Tensor]
) -> list[Tensor | None]:
    """The penalty's gradient for each direction's recurrent weights, None where none is wanted."""
    exact = torch.promote_types(rows.dtype, torch.float32)
    laid, back = (laid_out(part.to(exact), ctx.sizes) for part in (rows, dy))
    wanted, parts = (
        ctx.needs_input_grad[5:],
        zip(laid.x.chunk(len(hhs), -1), back.x.chunk(len(hhs), -1), dlast, hhs, strict=True),
    )
    found: list[Tensor | None] = []
    for way, (h, dh, dh_last, hh) in enumerate(parts):
        if way:
            h, dh = laid.turned(h), laid.turned(dh)
        gradient = None
        if wanted[way]:
            dh = _with_last(dh, dh_last.to(exact), laid)
            made = penalty_gradient(h, dh, hh.to(exact), ctx.phi)
            gradient = (ctx.weight * made).to(hh.dtype)
        found.append(gradient)
    return found


def _with_last(dy: Tensor, dlast: Tensor, laid: Laid) -> Tensor:
    """The gradients of all outputs with that of the last state at each sequence's own end."""
    if laid.lengths is None:
        return torch.cat([dy[:-1], (dy[-1] + dlast).unsqueeze(0)])
    ends = laid.lengths.to(dy.device) - 1
    return dy.index_put((ends, torch.arange(len(ends), device=dy.device)), dlast, accumulate=True)


def penalty_gradient(h: Tensor, dy: Tensor, hh: Tensor, activation: str = "tanh") -> Tensor:
    """The immediate gradient (H, H) of Omega with respect to the recurrent weights hh.

    h: states (T, B, H); dy: the loss's gradient (T, B, H) with respect to each alone, without
    the way over later steps; 0 where a shorter sequence is over. activation: "tanh" or "relu".
    """
    slopes = ACTIVATIONS[activation].slope(h).unbind(0)
    back, deltas, into, kept = torch.zeros_like(dy[0]), [], [], []
    for t in range(len(slopes) - 1, -1, -1):
        deltas.append(dy[t] + back)
        into.append(deltas[-1] * slopes[t])
        back = into[-1] @ hh
        kept.append(back)
    delta, v, vw = (torch.stack(parts) for parts in (deltas, into, kept))
    size, left = delta.square().sum(-1), vw.square().sum(-1)
    counts = size >= FAINT
    both = (size * left).sqrt()
    # Where nothing is left the norm has a kink, at which autograd takes 0 as well.
    factor = torch.where(counts & (both > 0), 2 * ((left / size).sqrt() - 1) / both, 0.0)
    rows, width = h.shape[0] * h.shape[1], h.shape[2]
    # Not flatten, which has no rule for gradients in batches.
    weighted = (v * factor.unsqueeze(-1)).reshape(rows, width)
    return weighted.t() @ vw.reshape(rows, width) / counts.sum().clamp_min(1)


_eager: Callable[[PenalizedRNN, Any, Any], Any] | None = None


def _kept_eager() -> Callable[[PenalizedRNN, Any, Any], Any]:
    global _eager
    if _eager is None:
        _eager = torch.compiler.disable(PenalizedRNN._forward)  # type: ignore[no-untyped-call]
    return _eager
