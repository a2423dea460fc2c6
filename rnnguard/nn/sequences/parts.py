"""The tensors of one layer in one direction: what a sequence is called with.

x is (T, B, F); T steps, B sequences, F features, H hidden units, P outputs a step.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LSTMWeights(NamedTuple):
    """Torch's own tensors of one layer and direction: (4H, F), (4H, P), (4H,), (4H,), (P, H)."""

    ih: Tensor
    hh: Tensor
    bias_ih: Tensor | None = None
    bias_hh: Tensor | None = None
    hr: Tensor | None = None


class LSTMNorms(NamedTuple):
    """Gains of the three norms, the gates' common shift, and the cell's: (4H,) x 3, (H,) x 2."""

    gain_ih: Tensor
    gain_hh: Tensor
    shift: Tensor
    gain_cell: Tensor
    shift_cell: Tensor
    eps: float


class Kept(NamedTuple):
    """Shares of the old states that stay at each step, (T, B, 1 or size); None: nothing does."""

    hidden: Tensor | None = None
    cell: Tensor | None = None


class GRUWeights(NamedTuple):
    """Torch's own tensors of one layer and direction of n rows: (n, F), (n, H), (n,), (n,).

    n is 3H in a GRU, whose gates are r, z, n, and H in a plain recurrence.
    """

    ih: Tensor
    hh: Tensor
    bias_ih: Tensor | None = None
    bias_hh: Tensor | None = None


class GateNorms(NamedTuple):
    """Gains of the input's and the recurrent norm, and their common shift, (n,) each."""

    gain_ih: Tensor
    gain_hh: Tensor
    shift: Tensor
    eps: float
