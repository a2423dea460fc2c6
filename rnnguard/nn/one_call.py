"""A whole recurrence as one call: whoever looks on sees what torch's own kernel would show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function

from rnnguard.inspection.gates import GATES, cell_of
from rnnguard.inspection.native import looked_at

States = tuple[Tensor, ...]
Run = Callable[[Tensor, States], tuple[Tensor, States]]


def as_one_call(
    module: nn.RNNBase, rows: Tensor, batch_sizes: Tensor | None, states: States, run: Run
) -> tuple[Tensor, States]:
    """run(rows, states), recorded as one call of torch's kernel with that kernel's arguments.

    In place of the weights stand all parameters of the module.
    """
    if torch.compiler.is_compiling() or not looked_at():
        return run(rows, states)
    cell = cell_of(module)
    assert cell is not None
    sizes = () if batch_sizes is None else (batch_sizes,)
    hidden = states if len(states) > 1 else states[0]
    args = (rows, *sizes, hidden, list(module.parameters()), module.bias, module.num_layers,
            module.dropout, module.training, module.bidirectional)  # fmt: skip
    output, *last = _KERNELS[cell](*args, *(() if sizes else (False,)), run=run)
    return output, tuple(last)


def _kernel(name: str) -> Callable[..., tuple[Tensor, ...]]:
    """A function of the name and the arguments of torch's own, and of what it runs."""

    def kernel(*args: Any, run: Run) -> tuple[Tensor, ...]:
        if looked_at():
            result: tuple[Tensor, ...] = handle_torch_function(kernel, args[:1], *args, run=run)
            return result
        hidden = args[2] if isinstance(args[3], list) else args[1]
        rows, last = run(args[0], hidden if isinstance(hidden, tuple) else (hidden,))
        return rows, *last

    kernel.__name__ = name
    return kernel


_KERNELS = {cell: _kernel(cell) for cell in GATES}
