"""Rows of a call as (T, B, F), padded where they were packed, and steps back as rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence


@dataclass(frozen=True)
class Laid:
    """(T, B, F), zeros behind each end; lengths (B,), None where all are as long as x."""

    x: Tensor
    lengths: Tensor | None

    def over(self) -> Tensor | None:
        """(T, B, 1), 1 where a shorter sequence is over and its state stays."""
        if self.lengths is None:
            return None
        return (self._steps() >= self._ends()).unsqueeze(-1).to(self.x.dtype)

    def turned(self, y: Tensor) -> Tensor:
        """y (T, B, n) from each sequence's own end to its start; its own inverse."""
        if self.lengths is None:
            return y.flip(0)
        back = self._ends() - 1 - self._steps()
        index = torch.where(back >= 0, back, self._steps())
        return y.gather(0, index.unsqueeze(-1).expand_as(y))

    def rows(self, y: Tensor) -> Tensor:
        """y (T, B, n) as the rows of the call: packed where they were."""
        return y if self.lengths is None else pack_padded_sequence(y, self.lengths).data

    def _steps(self) -> Tensor:
        return torch.arange(len(self.x), device=self.x.device).unsqueeze(1)

    def _ends(self) -> Tensor:
        assert self.lengths is not None
        return self.lengths.to(self.x.device)


def laid_out(rows: Tensor, batch_sizes: Tensor | None) -> Laid:
    """Rows (T, B, F), or packed ones (sum of the lengths, F) with their `batch_sizes`."""
    if batch_sizes is None:
        return Laid(rows, None)
    return Laid(*pad_packed_sequence(PackedSequence(rows, batch_sizes)))
