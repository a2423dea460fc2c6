"""Attention over a recurrence's own past, added to its output: every past step one hop away."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from rnnguard.inspection.native import looked_at
from rnnguard.nn.sequences.precision import half_precision
from rnnguard.nn.sequences.rungs import Left, Rungs, Tensors, climb

_WIDTHS = (8, 16)  # of narrow and of wide outputs
_WIDE = 256  # features
_BLOCK = 64  # queries taken at once: few keys then lie after all of them
_KEPT = 4  # times the output's size that the weights may take until the backward

_softmax_backward = torch.ops.aten._softmax_backward_data.default


class AttentionReadout(nn.Module):
    """The `attention` child of FusedRNN, FusedLSTM and FusedGRU: y_t + W_o attention(y_1 .. y_t).

    Causal scaled-dot-product attention (Vaswani et al. 2017) over the outputs up to and including
    the present one. W_o starts at zero, so the function does not change at first, and the rest
    gets its gradient from the second step on. Only the output is read, so a model that uses the
    last states alone gains nothing.

    With two directions each attends within what its own recurrence has read: the forward one up
    to t, the reverse one from its sequence's end down to t, each with its own weights. Neither
    sees a step that the module's output at t did not depend on before.

    width: features each of queries, keys and values; by default 16 where the output has 256 or
    more, else 8 at most, since the cost grows with the square of the steps times the width.
    heads: how many they are split into.
    On a GPU and in half precision torch's fused kernels run. They have no second derivative and
    say so; inside of `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)` there is one.
    """

    def __init__(self, module: nn.RNNBase, *, width: int | None = None, heads: int = 1) -> None:
        super().__init__()
        size = module.proj_size or module.hidden_size
        if width is None:
            width = min(_WIDTHS[size >= _WIDE], size)
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
        read, write = self.read[way].weight, self.write[way].weight
        assert isinstance(read, Tensor) and isinstance(write, Tensor)
        if _by_hand(rows, read):
            return climb(_RUNGS, _Call(rows, read, write, self.heads), read, ())[0]
        query, key, value = _by_head(linear(rows, read), self.heads)
        seen = scaled_dot_product_attention(query, key, value, is_causal=True)
        return rows + linear(_joined(seen), write).to(rows.dtype)

    def extra_repr(self) -> str:
        return f"heads={self.heads}"


def _by_hand(rows: Tensor, weight: Tensor) -> bool:
    """Whether this is the better way: not where torch has a kernel, or someone wants its name."""
    named = torch.compiler.is_compiling() or looked_at()
    return not named and rows.device.type == "cpu" and half_precision(rows, weight) is None


def _from_the_end(steps: int, lengths: Tensor | None, device: torch.device) -> Tensor:
    """(T, B or 1, 1): each sequence's own steps from its end to its start; its own inverse."""
    step = torch.arange(steps, device=device).unsqueeze(1)
    back = (steps if lengths is None else lengths) - 1 - step
    return torch.where(back >= 0, back, step).unsqueeze(-1)


class _Call(NamedTuple):
    """x: rows (T, B, n). read: (3 width, n). write: (n, width)."""

    x: Tensor
    read: Tensor
    write: Tensor
    heads: int


def attended(call: _Call) -> Tensors:
    """Rung 0."""
    query, key, value = _by_head(linear(call.x, call.read), call.heads)
    steps = len(call.x)
    later = torch.ones(steps, steps, dtype=torch.bool, device=call.x.device).triu(1)
    scores = (query @ key.transpose(-1, -2) * key.shape[-1] ** -0.5).masked_fill(later, -math.inf)
    return (call.x + linear(_joined(scores.softmax(-1) @ value), call.write),)


def _by_head(read: Tensor, heads: int) -> Tensor:
    """Queries, keys and values (3, B, heads, T, n) of what was read (T, B, 3 width)."""
    return torch.unflatten(read, -1, (3, heads, -1)).permute(2, 1, 3, 0, 4)


def _joined(seen: Tensor) -> Tensor:
    """(T, B, width) of (B, heads, T, n)."""
    return seen.permute(2, 0, 1, 3).flatten(2)


def _forward(call: _Call) -> tuple[Tensors, Left]:
    """Feature by feature in memory, steps side by side: products of few features are slow else."""
    steps, rows = len(call.x), call.x.flatten(0, 1)
    three = _across(call.read, call.x)
    query, key, value = _parts(three, call.heads)
    seen, kept = [], list[Tensor]()
    for start, stop in _blocks(steps):
        weights = _weights(query[..., start:stop], key[..., :stop])
        seen.append(torch.bmm(value[..., :stop], weights.mT))
        if steps <= _KEPT * rows.shape[1]:
            kept.append(weights)
    read = _along(_end_to_end(seen), call.write.shape[1], call)
    output = torch.addmm(rows, read, call.write.T)
    return (output.view(call.x.shape),), (three, read, *kept)


def _weights(query: Tensor, key: Tensor) -> Tensor:
    """(N, queries, keys) of the last queries among the steps of the keys; both (N, n, steps)."""
    queries, keys = query.shape[-1], key.shape[-1]
    later = query.new_full((queries, keys), -math.inf).triu_(keys - queries + 1)
    scores = torch.baddbmm(later, query.mT, key, alpha=key.shape[1] ** -0.5)
    return torch.softmax(scores, -1)


def _backward(call: _Call, left: Left, cotangents: Tensors, wanted: _Call) -> _Call:
    three, read, *kept = left
    assert three is not None and read is not None
    rows, cotangent = call.x.flatten(0, 1), cotangents[0].contiguous().flatten(0, 1)
    share = _across(call.write.T, cotangent.view(call.x.shape))
    into_three = torch.cat(_into_three(three, share, kept, call), 1)
    into = _along(into_three, len(call.read), call)
    return _Call(
        torch.addmm(cotangent, into, call.read).view(call.x.shape),
        into.T @ rows,
        (read.T @ cotangent).T,
        0,
    )


def _into_three(
    three: Tensor, share: Tensor, kept: Sequence[Tensor | None], call: _Call
) -> Tensors:
    """The gradients of queries, keys and values (B, width, T) from that of what they gave."""
    query, key, value = _parts(three, call.heads)
    (share,) = _parts(share, call.heads, 1)
    scale = key.shape[1] ** -0.5
    into_query: list[Tensor] = []
    into_key, into_value = torch.zeros_like(key), torch.zeros_like(value)
    for index, (start, stop) in enumerate(_blocks(key.shape[-1])):
        asking, asked, own = query[..., start:stop], key[..., :stop], share[..., start:stop]
        weights = kept[index] if kept else _weights(asking, asked)
        assert weights is not None
        scores = torch.bmm(own.mT, value[..., :stop])
        scores = _softmax_backward(scores, weights, -1, scores.dtype)
        into_query.append(torch.bmm(asked, scores.mT))
        into_key[..., :stop] += torch.bmm(asking, scores)
        into_value[..., :stop] += torch.bmm(own, weights)
    parts = (_end_to_end(into_query).mul_(scale), into_key.mul_(scale), into_value)
    return tuple(part.view(call.x.shape[1], len(call.read) // 3, len(call.x)) for part in parts)


def _across(weight: Tensor, rows: Tensor) -> Tensor:
    """Features (B, m, T) by a weight (m, n) from rows (T, B, n), in one product without a copy."""
    return torch.bmm(weight.expand(rows.shape[1], -1, -1), rows.permute(1, 2, 0))


def _parts(features: Tensor, heads: int, count: int = 3) -> list[Tensor]:
    """That many parts (B heads, n, T) of the features (B, m, T)."""
    parts = torch.unflatten(features, 1, (count, heads, -1)).unbind(1)
    return [part.flatten(0, 1) for part in parts]


def _along(read: Tensor, width: int, call: _Call) -> Tensor:
    """(T B, width) of (B, width, T), or of (B heads, n, T)."""
    steps, batch, _ = call.x.shape
    return read.view(batch, width, steps).permute(2, 0, 1).reshape(steps * batch, width)


def _end_to_end(blocks: list[Tensor]) -> Tensor:
    return torch.cat(blocks, -1) if len(blocks) > 1 else blocks[0]


def _blocks(steps: int) -> Iterator[tuple[int, int]]:
    for start in range(0, steps, _BLOCK):
        yield start, min(start + _BLOCK, steps)


_RUNGS = Rungs(attended, _forward, _backward)
