"""Whether an optimizer's checkpoint belongs to its parameters in their present order.

torch keys the state by position: an optimizer built anew on a rewritten model holds the new
parameters in the model's order, one that adopted them holds them last, and a checkpoint of the
one loads into the other without a word, its moments permuted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from rnnguard.errors import Refusal

# State of the parameter's own shape, in torch's optimizers and in those built after them.
_ELEMENTWISE = frozenset({
    "momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg",
    "grad_avg", "acc_delta", "sum", "ax", "prev", "step_size",
})  # fmt: skip
_CURE = (
    "Build the plain model and its optimizer, call `rnnguard.apply(model, optimizer, plan)`, "
    "then load the state."
)


def order_refusals(optimizer: Optimizer, state_dict: Mapping[str, Any]) -> Iterator[Refusal]:
    """Why loading would put state at the wrong parameters, or fail; nothing where it fits.

    Told by the number of parameters, by their names where both sides have them, and by shapes;
    parameters of one shape without names cannot be told apart.
    """
    present, saved = optimizer.param_groups, state_dict["param_groups"]
    counts = [[len(group["params"]) for group in groups] for groups in (saved, present)]
    if counts[0] != counts[1]:
        fact = f"the checkpoint holds {_listed(counts[0])} parameters, not {_listed(counts[1])}."
        yield Refusal("RG915", "optimizer", fact, _CURE)
        return
    for old, new in zip(saved, present, strict=True):
        # Only pairs, since one side may have no names.
        names = zip(old.get("param_names") or (), new.get("param_names") or (), strict=False)
        if (odd_pair := next((pair for pair in names if pair[0] != pair[1]), None)) is not None:
            fact = f"the checkpoint has the state of {odd_pair[0]} where {odd_pair[1]} is now."
            yield Refusal("RG915", "optimizer", fact, _CURE)
            return
    indices = chain.from_iterable(group["params"] for group in saved)
    params = chain.from_iterable(group["params"] for group in present)
    for index, param in zip(indices, params, strict=True):
        shapes = _shapes(state_dict["state"].get(index, {}))
        if odd := [shape for shape in shapes if shape != tuple(param.shape)]:
            fact = f"the checkpoint's state {index} has shape {odd[0]}, not {tuple(param.shape)}."
            yield Refusal("RG915", "optimizer", fact, _CURE)
            return


def _shapes(state: Any) -> Iterator[tuple[int, ...]]:
    held = state if isinstance(state, Mapping) else {}
    for key in _ELEMENTWISE & set(held):
        if isinstance(held[key], Tensor):
            yield tuple(held[key].shape)


def _listed(counts: list[int]) -> str:
    return " + ".join(map(str, counts))
