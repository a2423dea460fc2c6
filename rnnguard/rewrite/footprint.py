"""The tensors an edit has touched, as it left them: tells whether training has passed since."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from rnnguard.probe.snapshot import same_bits

Touched = dict[int, tuple[Tensor, Tensor]]


class Footprint:
    """Copies of the touched tensors, with their names in the model.

    Change is told by the bits: fused optimizers do not bump a tensor's `_version`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._names = _names(model)
        self._left: Touched = {}

    def name(self, tensor: Tensor) -> str:
        """Its name in the model, or nothing."""
        return self._names.get(id(tensor), "")

    def touch(self, tensor: Tensor) -> None:
        """Takes the present bits of `tensor` as those that the edit left."""
        self._left[id(tensor)] = (tensor, tensor.detach().clone())

    def touch_untouched(self, tensors: Iterable[Tensor]) -> None:
        """The same for new names and for tensors that were not touched before."""
        self._names = _names(self._model)
        for tensor in tensors:
            if id(tensor) not in self._left:
                self.touch(tensor)

    def saved(self) -> Touched:
        return dict(self._left)

    def restore(self, saved: Touched) -> None:
        self._left = saved

    def changed(self) -> list[str]:
        """Names of the tensors that differ from what the edit left, or left the model."""
        present = _names(self._model)
        return [
            self._names.get(key, "a tensor")
            for key, (tensor, left) in self._left.items()
            if not same_bits(tensor, left) or (key in self._names and key not in present)
        ]


def _names(model: nn.Module) -> dict[int, str]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return {id(tensor): name for name, tensor in named}
