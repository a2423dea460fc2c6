"""Starts that are drawn without a look at the data: chrono biases and orthogonal matrices."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.outcomes.models import WrittenReader
from benchmarks.outcomes.policies import Case, Prepared, clipped

BLOCKS: dict[type[nn.RNNBase], int] = {nn.RNN: 1, nn.LSTM: 4, nn.GRU: 3}


def chrono_and_clip(case: Case) -> Prepared:
    """Chrono biases for the length of the sequences (Tallec and Ollivier 2018, eq. 16), clip 1."""
    return clipped(case, done="chrono" if chrono_(case.model, case.task.steps) else "")


@torch.no_grad()
def chrono_(model: nn.Module, longest: int) -> bool:
    """Draws keep biases log U(1, longest - 1) for cells that have a keep gate.

    In torch's gate order; the LSTM's input gates get the opposite, all other biases 0.
    """
    if isinstance(model, WrittenReader):
        keep, rest = model.cell.input.bias.chunk(2)
        rest.zero_()
        _draw_(keep, longest)
        return True
    rnn = recurrence(model)
    if isinstance(rnn, nn.RNN):
        return False
    for name, bias in rnn.named_parameters():
        if "bias" not in name:
            continue
        bias.zero_()
        if "bias_ih" in name:
            parts = bias.chunk(BLOCKS[type(rnn)])
            _draw_(parts[1], longest)
            if isinstance(rnn, nn.LSTM):
                parts[0].copy_(-parts[1])
    return True


def _draw_(bias: Tensor, longest: int) -> None:
    bias.uniform_(1, max(longest - 1, 2)).log_()


def recurrence(model: nn.Module) -> nn.RNNBase:
    """The fused recurrence of a model that has one."""
    return next(module for module in model.modules() if isinstance(module, nn.RNNBase))
