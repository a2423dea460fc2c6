"""Whether a recurrence's weights still look as some initialisation left them.

Re-initialising trained weights destroys a user's work, so every tensor must match a known
initialisation; whatever is unsure counts as trained.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rnnguard.inspection.gates import GATES, Gates, Weights, cell_of, recurrences, weights_of

SAMPLE = 40_000
_P_UNIFORM = 1e-3
_P_NORMAL = 0.01


def looks_untrained(module: nn.Module) -> bool:
    """Whether all weights of the recurrence match a known initialisation."""
    cell = cell_of(module)
    assert cell is not None
    return all(
        _weights_look_untrained(weights_of(module, layer, direction), GATES[cell])
        for layer, direction in recurrences(module)
    )


def look_untrained(recurrent: Sequence[Tensor], beside: Sequence[Tensor]) -> bool:
    """Whether the recurrent weights of a hand-written cell match a known initialisation.

    `beside` are all parameters of its module: the matrices tell how wide the layers are that
    the biases belong to.
    """
    matrices = [p for p in (*recurrent, *beside) if p.dim() > 1]
    fans = {size for matrix in matrices for size in matrix.shape}
    biases = [p.detach().double() for p in beside if p.dim() == 1]
    sound = [p.detach().double() for p in recurrent]
    return all(_known(b, fans) for b in biases) and all(
        _known(m, fans)
        or (m.dim() == 2 and any(_is_orthogonal(m, k) for k in (1, 2, 3, 4)))
        or _is_normal(m)
        for m in sound
    )


def _known(tensor: Tensor, fans: set[int]) -> bool:
    return _is_constant(tensor) or any(_is_uniform(tensor, fan, 1) for fan in fans)


def _weights_look_untrained(weights: Weights, gates: Gates) -> bool:
    hidden, blocks = weights.hidden_size, len(gates.blocks)
    biases = [b.detach().double() for b in (weights.bias_ih, weights.bias_hh) if b is not None]
    known_biases = bool(biases) and all(_known_bias(bias, gates, hidden) for bias in biases)
    matrices = [m.detach().double() for m in (weights.ih, weights.hh, weights.hr) if m is not None]
    # A Gaussian start stays nearly Gaussian in training, so it is believed only together
    # with biases that are exactly as some initialisation left them.
    return (known_biases or not biases) and all(
        _is_uniform(m, hidden, blocks)
        or _is_orthogonal(m, blocks)
        or _is_constant(m)
        or (known_biases and _is_normal(m))
        for m in matrices
    )


def _known_bias(bias: Tensor, gates: Gates, hidden: int) -> bool:
    parts = dict(zip(gates.blocks, bias.chunk(len(gates.blocks)), strict=True))
    return (
        all(map(_is_constant, parts.values()))
        or _is_uniform(bias, hidden, len(gates.blocks))
        or _is_chrono(parts, gates)
    )


def _is_chrono(parts: dict[str, Tensor], gates: Gates) -> bool:
    """Whether only the keep bias is spread, and the write bias is its exact opposite."""
    if gates.keep is None:
        return False
    tied = gates.write is None or torch.equal(parts[gates.write], -parts[gates.keep])
    rest = [part for name, part in parts.items() if name not in (gates.keep, gates.write)]
    return tied and all(map(_is_constant, rest))


def _is_constant(tensor: Tensor) -> bool:
    return bool(tensor.max() - tensor.min() < 1e-7)


def _is_uniform(tensor: Tensor, hidden: int, blocks: int) -> bool:
    """Uniform about zero with one of the usual bounds: torch's default, Xavier, Kaiming."""
    largest, count = float(tensor.abs().max()), tensor.numel()
    return any(
        largest <= bound * (1 + 1e-6)
        and largest >= bound * (1 - 12 / count)
        and _p_value(tensor, "uniform", (-bound, 2 * bound)) > _P_UNIFORM
        for bound in _bounds(tensor, hidden, blocks)
    )


def _bounds(tensor: Tensor, hidden: int, blocks: int) -> list[float]:
    bounds = [1 / math.sqrt(hidden)]
    if tensor.dim() == 2:
        rows, columns = tensor.shape
        for fan_out in (rows, rows // blocks):
            bounds.append(math.sqrt(6 / (columns + fan_out)))
        bounds += [math.sqrt(6 / columns), math.sqrt(3 / columns), 1 / math.sqrt(columns)]
    return bounds


def _is_orthogonal(matrix: Tensor, blocks: int) -> bool:
    """Whether the whole matrix, or each gate's block, is a multiple of an orthogonal one."""
    parts = matrix.chunk(blocks) if matrix.shape[0] % blocks == 0 else (matrix,)
    return _orthogonality_error(matrix) < 1e-3 or all(_orthogonality_error(p) < 1e-3 for p in parts)


def _orthogonality_error(matrix: Tensor) -> float:
    thin = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    gram = thin.T @ thin
    scale = float(gram.diagonal().mean())
    if scale == 0:
        return math.inf
    return float((gram / scale - torch.eye(len(gram), dtype=gram.dtype)).abs().max())


def is_orthogonal_across_gates(weights: Weights, blocks: int) -> bool:
    """Whether the stacked recurrent matrix is orthogonal while its gates are not."""
    if blocks == 1:
        return False
    matrix = weights.hh.detach().double().cpu()
    apart = [_orthogonality_error(block) for block in matrix.chunk(blocks)]
    return _orthogonality_error(matrix) < 1e-3 and max(apart) > 1e-2


def _is_normal(tensor: Tensor) -> bool:
    spread = float(tensor.std())
    return spread > 0 and _p_value(tensor, "norm", (0.0, spread)) > _P_NORMAL


def _p_value(tensor: Tensor, distribution: str, parameters: tuple[float, float]) -> float:
    from scipy.stats import kstest

    # Evenly spaced values of a huge matrix tell as much, in a fraction of the time.
    values = tensor.flatten()[:: 1 + tensor.numel() // SAMPLE].cpu().numpy()
    return float(kstest(values, distribution, args=parameters).pvalue)
