"""Attention over a recurrence's own past, added to its output: every past step one hop away."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

_WIDTH = 16  # one head of 16 is the fastest of 8, 16, 32 and 64 in torch's kernel for CPUs


class AttentionReadout(nn.Module):
    """The `attention` child of FusedRNN, FusedLSTM and FusedGRU: y_t + W_o attention(y_1 .. y_t).

    Causal scaled-dot-product attention (Vaswani et al. 2017) over the outputs up to and including
    the present one. W_o starts at zero, so the function does not change at first, and the rest
    gets its gradient from the second step on. Only the output is read, so a model that uses the
    last states alone gains nothing.

    With two directions each attends within what its own recurrence has read: the forward one up
    to t, the reverse one from its sequence's end down to t, each with its own weights. Neither
    sees a step that the module's output at t did not depend on before.

    width: features each of queries, keys and values, by default 16 at most, since the cost grows
    with the square of the steps times the width. heads: how many they are split into.
    torch's fast kernels have no second derivative and say so; inside of
    `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)` there is one.
    """

    def __init__(self, module: nn.RNNBase, *, width: int | None = None, heads: int = 1) -> None:
        super().__init__()
        size = module.proj_size or module.hidden_size
        width = min(_WIDTH, size) if width is None else width
        if width < 1 or heads < 1 or width % heads:
            raise ValueError(f"width {width} cannot be split into {heads} heads")
        self.heads = heads
        like = next(module.parameters())
        ways = range(2 if module.bidirectional else 1)
        self.read = nn.ModuleList(nn.Linear(size, 3 * width, bias=False) for _ in ways)
        self.write = nn.ModuleList(nn.Linear(width, size, bias=False) for _ in ways)
        self.reset_parameters()
        self.to(device=like.device, dtype=like.dtype)

    def reset_parameters(self) -> None:
        """The queries, keys and values as torch draws linear maps, and nothing added."""
        for read, write in zip(self.read, self.write, strict=True):
            assert isinstance(read, nn.Linear) and isinstance(write, nn.Linear)
            read.reset_parameters()
            nn.init.zeros_(write.weight)

    def forward(self, rows: Tensor, batch_sizes: Tensor | None) -> Tensor:
        """Output rows (T, B, n), or packed (N, n), with what was read from their past added."""
        if batch_sizes is None:
            return self._read(rows, None)
        # (T, B): the steps that each sequence has. Padding follows every step that is wanted, so
        # that no causal query sees it.
        on = torch.arange(int(batch_sizes[0])) < batch_sizes.unsqueeze(1)
        place = (on.flatten().cumsum(0) - 1).clamp_min(0).view_as(on).to(rows.device)
        lengths = on.sum(0).to(rows.device)
        return self._read(rows[place], lengths)[on.to(rows.device)]

    def _read(self, rows: Tensor, lengths: Tensor | None) -> Tensor:
        if len(self.read) == 1:
            return self._one_way(0, rows)
        forward, reverse = rows.chunk(2, -1)
        order = _from_the_end(len(rows), lengths, rows.device)
        turned = reverse.gather(0, order.expand_as(reverse))
        read = self._one_way(1, turned)
        return torch.cat([self._one_way(0, forward), read.gather(0, order.expand_as(read))], -1)

    def _one_way(self, way: int, rows: Tensor) -> Tensor:
        """rows (T, B, n) in the order in which the recurrence went."""
        three = torch.unflatten(self.read[way](rows), -1, (3, self.heads, -1))
        query, key, value = three.permute(2, 1, 3, 0, 4)
        seen = scaled_dot_product_attention(query, key, value, is_causal=True)
        added: Tensor = self.write[way](seen.permute(2, 0, 1, 3).flatten(2))
        return rows + added.to(rows.dtype)

    def extra_repr(self) -> str:
        return f"heads={self.heads}"


def _from_the_end(steps: int, lengths: Tensor | None, device: torch.device) -> Tensor:
    """(T, B or 1, 1): each sequence's own steps from its end to its start; its own inverse."""
    step = torch.arange(steps, device=device).unsqueeze(1)
    back = (steps if lengths is None else lengths) - 1 - step
    return torch.where(back >= 0, back, step).unsqueeze(-1)
