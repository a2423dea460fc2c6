"""The file that a tensor's memory is mapped from, as with `torch.load(..., mmap=True)`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

MAPS = Path("/proc/self/maps")
_LINE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \d+\s+(/.*)")
# Memory shared between processes is a file too, yet holds no checkpoint.
_SHARED = ("/dev/shm/", "/memfd:", "/dev/zero", "/SYSV")


def file_behind(tensors: Iterable[Tensor]) -> str | None:
    """The name of a mapped file that holds any of the values; None for memory of the process.

    Only Linux tells; elsewhere, and for tensors on a device, the answer is None.
    """
    addresses = [tensor.data_ptr() for tensor in tensors if tensor.device.type == "cpu"]
    if not addresses or not MAPS.exists():
        return None
    for line in MAPS.read_text(errors="replace").splitlines():
        found = _LINE.match(line)
        if found and any(int(found[1], 16) <= a < int(found[2], 16) for a in addresses):
            path = found[3].removesuffix(" (deleted)")
            if not path.startswith(_SHARED):
                return Path(path).name
    return None
