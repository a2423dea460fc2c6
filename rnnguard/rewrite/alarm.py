"""The warning after too many non-finite steps in a row, without ever waiting for the device."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from rnnguard.errors import Refusal, RNNGuardWarning


class Alarm:
    """Warns once per row of non-finite steps, as soon as the host happens to know of it.

    On CUDA the count of such rows is copied into pinned memory behind the step's own work and
    looked at later, when the copy is done; devices of other kinds than CPU and CUDA are silent.
    """

    def __init__(self) -> None:
        self._told = 0
        self._host: Tensor | None = None
        self._view: Any = None
        self._done: Any = None

    def look(self, rows: Tensor, budget: int, step: int) -> None:
        """Sends for the count of rows of `budget` broken steps; warns (RG413) of new ones."""
        if rows.device.type not in ("cpu", "cuda"):
            return
        if not self._arrived():
            return
        self._warn_of(budget, step)
        self._send(rows)
        if self._done is None:
            self._warn_of(budget, step)

    def _arrived(self) -> bool:
        return self._done is None or bool(self._done.query())

    def _send(self, rows: Tensor) -> None:
        if self._host is None or self._host.dtype != rows.dtype:
            self._host = torch.zeros((), dtype=rows.dtype, pin_memory=rows.is_cuda)
            # Read through numpy, whose view of the memory asks torch for nothing.
            self._view = self._host.numpy()
        self._host.copy_(rows, non_blocking=True)
        self._done = _recorded(rows.device)

    def _warn_of(self, budget: int, step: int) -> None:
        found = 0 if self._view is None else int(self._view)
        new, self._told = found > self._told, found
        if new:
            fact = f"by step {step} the gradient was not finite {budget} times in a row."
            cure = "Look at the data of these steps; lower the learning rate."
            warnings.warn(str(Refusal("RG413", "", fact, cure)), RNNGuardWarning, stacklevel=2)


def _recorded(device: torch.device) -> Any:
    """An event behind all work that the device was given so far; None where work is at once."""
    if device.type != "cuda":
        return None
    event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event
