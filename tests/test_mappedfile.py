"""That a tensor in a mapped file is told from one in the memory of the process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rnnguard.inspection import mappedfile
from rnnguard.inspection.mappedfile import file_behind

pytestmark = pytest.mark.skipif(not mappedfile.MAPS.exists(), reason="only Linux tells")


def test_a_mapped_checkpoint_and_a_plain_one(tmp_path: Path) -> None:
    file = tmp_path / "last step.pt"
    torch.save({"w": torch.randn(500)}, file)
    assert file_behind([torch.load(file)["w"]]) is None
    mapped = torch.load(file, mmap=True)["w"]
    assert file_behind([torch.zeros(3), mapped]) == "last step.pt"
    assert mapped.untyped_storage().filename is None  # why the map of the process is read
    assert file_behind([mapped.clone()]) is None


def test_memory_shared_between_processes_is_no_file() -> None:
    assert file_behind([torch.randn(500).share_memory_()]) is None


def test_elsewhere_nothing_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(mappedfile, "MAPS", tmp_path / "absent")
    assert file_behind([torch.zeros(3)]) is None
