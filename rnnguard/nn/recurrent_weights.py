"""Recurrent weights made anew at each forward from torch's own parameters.

Not through torch.nn.utils.parametrize, which renames the parameters: keys, parameter objects and
optimizer state stay torch's. Gates are the blocks of H rows of `weight_hh`; every gate is held for
itself. Layers and directions, whose shapes are equal, are made in one batch where that is faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from rnnguard.inspection.gates import GATES, cell_of, recurrences, weights_of
from rnnguard.nn.spectral_norm import within_spectral_norm

_BASIS = 4  # vectors of the power iteration: close leading values then no longer slow it down


def recurrent_parameters(module: nn.RNNBase) -> list[Tensor]:
    """Every `weight_hh` of the module, in torch's order of layers and directions."""
    return [weights_of(module, layer, way).hh for layer, way in recurrences(module)]


class RecurrentWeights(nn.Module):
    """The `recurrent` child of FusedRNN, FusedLSTM and FusedGRU.

    forward(weights, training): the recurrent weights that the kernel takes, from the module's
    own (all of one shape, in torch's order of layers and directions), differentiably.
    """

    def __init__(self, module: nn.RNNBase) -> None:
        super().__init__()
        cell = cell_of(module)
        assert cell is not None
        self.gates = len(GATES[cell].blocks)

    def follow(self, weights: Sequence[Tensor]) -> None:
        """Sets its own parameters to what leaves these weights as they are, if it has any."""

    def completed(self, weights: Sequence[Tensor]) -> dict[str, Tensor]:
        """Its own keys for a checkpoint that holds these weights and nothing of the child's."""
        return {}

    def forward(self, weights: Sequence[Tensor], training: bool) -> list[Tensor]:
        raise NotImplementedError

    def _by_gate(self, weights: Sequence[Tensor]) -> Tensor:
        """(N, gates, H, P) of N weights (gates H, P), at least in float32."""
        # One weight is viewed: stacked, it would be copied, forward and backward.
        whole = torch.stack(list(weights)) if len(weights) > 1 else weights[0].unsqueeze(0)
        stacked = torch.unflatten(whole, 1, (self.gates, -1))
        return stacked.to(torch.promote_types(stacked.dtype, torch.float32))

    @staticmethod
    def _flat(made: Tensor, like: Tensor) -> list[Tensor]:
        flat = made.to(like.dtype).flatten(1, 2)
        return list(flat.unbind(0)) if len(flat) > 1 else [flat.squeeze(0)]


class DropConnect(RecurrentWeights):
    """Drops each recurrent weight with probability p in training, one mask for a whole forward.

    What stays is scaled by 1 / (1 - p) (Wan et al. 2013; on recurrent weights: Merity et al.
    2018). With p = 0 and outside of training the parameters go to the kernel as they are.
    """

    def __init__(self, module: nn.RNNBase, p: float = 0.5) -> None:
        super().__init__(module)
        if not 0 <= p < 1:
            raise ValueError(f"p is a probability of at least 0 and below 1, not {p}")
        self.p = float(p)

    def forward(self, weights: Sequence[Tensor], training: bool) -> list[Tensor]:
        if not training or not self.p:
            return list(weights)
        return [dropout(weight, self.p, True) for weight in weights]

    def extra_repr(self) -> str:
        return f"p={self.p}"


class WeightNorm(RecurrentWeights):
    """W = gain V / |V|, with V the module's own weight (Salimans and Kingma 2016).

    over: "row", one norm and gain for each row, or "gate", for each gate's block. The gains start
    as the norms of the weights at hand, so that the function stays what it is; a checkpoint of
    the plain module loads with the norms of its weights, and so as the same function.
    """

    gain: nn.Parameter

    def __init__(self, module: nn.RNNBase, over: Literal["row", "gate"] = "row") -> None:
        super().__init__(module)
        if over not in ("row", "gate"):
            raise ValueError(f"over is row or gate, not {over!r}")
        self.over: Literal["row", "gate"] = over
        weights = recurrent_parameters(module)
        with torch.no_grad():
            norms = self._norms(self._by_gate(weights)).to(weights[0].dtype)
        self.gain = nn.Parameter(norms, requires_grad=weights[0].requires_grad)

    @torch.no_grad()
    def follow(self, weights: Sequence[Tensor]) -> None:
        self.gain.copy_(self._norms(self._by_gate(weights)))

    @torch.no_grad()
    def completed(self, weights: Sequence[Tensor]) -> dict[str, Tensor]:
        return {"gain": self._norms(self._by_gate(weights)).to(weights[0].dtype)}

    def forward(self, weights: Sequence[Tensor], training: bool) -> list[Tensor]:
        split = self._by_gate(weights)
        # A row of zeros stays one, and gets no gradient, instead of 0 / 0.
        norms = self._norms(split).clamp_min(torch.finfo(split.dtype).tiny)
        return self._flat(split * (self.gain / norms), weights[0])

    def _norms(self, split: Tensor) -> Tensor:
        over = -1 if self.over == "row" else (-2, -1)
        norms: Tensor = torch.linalg.vector_norm(split, dim=over, keepdim=True)
        return norms

    def extra_repr(self) -> str:
        return f"over={self.over}"


class Orthogonal(RecurrentWeights):
    """Each gate's block by its orthogonal factor: Q of V = Q R with R's diagonal positive.

    QR and no Cayley transform or exponential: a block that is orthogonal already is kept as it
    is, blocks (H, P) of a projected LSTM get orthonormal columns, and it costs least (forward and
    backward, H = 256, four gates, one thread: QR 12, Cayley 17, exponential 192 ms). In float32
    at least. A block without full rank has no gradient; torch's own initialisation has it.
    """

    def forward(self, weights: Sequence[Tensor], training: bool) -> list[Tensor]:
        # One by one: LAPACK takes block by block anyway, and a stack would be copied.
        return [self._factor(weight) for weight in weights]

    def _factor(self, weight: Tensor) -> Tensor:
        blocks = torch.unflatten(weight, 0, (self.gates, -1))
        blocks = blocks.to(torch.promote_types(weight.dtype, torch.float32))
        with torch.autocast(weight.device.type, enabled=False):
            q, r = torch.linalg.qr(blocks)
            diagonal = r.diagonal(dim1=-2, dim2=-1).detach()
            turned = torch.ones_like(diagonal).copysign(diagonal).unsqueeze(-2)
            factor: Tensor = (q * turned).to(weight.dtype).flatten(0, 1)
            return factor


class SpectralBound(RecurrentWeights):
    """Scales each gate's block down to a spectral norm of `bound` where it exceeds it.

    Blocks within the bound go through unchanged, bit for bit. The norm is that of a power
    iteration with four vectors (Miyato et al. 2018 with one) which runs until the value settles,
    so that the bound also holds right after a load or a large step. Training forwards keep the
    vectors in the buffer `vectors`, from where the next one needs a few rounds. It is a cache: a
    checkpoint without it loads, and vmap, exports and second derivatives use torch's exact norm.
    """

    vectors: Tensor

    def __init__(self, module: nn.RNNBase, bound: float = 1.0) -> None:
        super().__init__(module)
        if not bound > 0:
            raise ValueError(f"bound is above 0, not {bound}")
        self.bound = float(bound)
        like = next(module.parameters())
        size = module.proj_size or module.hidden_size
        blocks = (len(recurrences(module)), self.gates)
        dtype = torch.promote_types(like.dtype, torch.float32)
        # Drawn apart, so that a morph does not move the user's random state.
        own = torch.Generator().manual_seed(size)
        start = torch.randn(*blocks, size, min(_BASIS, size), generator=own, dtype=dtype)
        self.register_buffer("vectors", torch.linalg.qr(start)[0].to(like.device))

    def forward(self, weights: Sequence[Tensor], training: bool) -> list[Tensor]:
        split = self._by_gate(weights)
        with torch.autocast(split.device.type, enabled=False):
            start = self.vectors.to(split.dtype, copy=True)
            made, vectors = within_spectral_norm(split, self.bound, start)
            if training and vectors is not None:
                self.vectors.copy_(vectors)
            return self._flat(made, weights[0])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *more: Any) -> None:
        """As torch does, but without `vectors` in the checkpoint the present ones serve."""
        state_dict.setdefault(f"{prefix}vectors", self.vectors)
        super()._load_from_state_dict(state_dict, prefix, *more)

    def extra_repr(self) -> str:
        return f"bound={self.bound}"
