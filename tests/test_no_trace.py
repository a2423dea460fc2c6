"""An audit leaves no trace on any model, wherever it is broken off and however."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from zoo import ZOO

import rnnguard
from rnnguard.probe.snapshot import fingerprint

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")

# Wired differently each: fused, cells, hand-written, with state, packed, cut, none of time.
SPECIMENS = [s for s in ZOO if s.kind != "none"][::9]
JUDGED = [s for s in SPECIMENS if s.kind in ("native", "written") and s.name != "echo-state"]
FAULTS: list[type[BaseException]] = [RuntimeError, KeyboardInterrupt, MemoryError, TimeoutError]


class _BreakAt(TorchFunctionMode):
    """Raises instead of making the call of that number."""

    def __init__(self, number: int, fault: type[BaseException]) -> None:
        super().__init__()
        self.left, self.fault = number, fault

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left == 0:
            raise self.fault("broken off")
        return func(*args, **(kwargs or {}))


class _Broken(nn.Module):
    """The model, its forward broken off at a torch call."""

    def __init__(self, model: nn.Module, number: int, fault: type[BaseException]) -> None:
        super().__init__()
        self.model, self.number, self.fault = model, number, fault

    def forward(self, *args: Any) -> Any:
        with _BreakAt(self.number, self.fault):
            return self.model(*args)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("specimen", SPECIMENS, ids=lambda s: s.name)
def test_a_forward_that_is_broken_off(specimen: Any, fault: type[BaseException]) -> None:
    inputs = specimen.inputs()
    for number in (3, 30):
        model = _Broken(specimen.build(), number, fault)
        before = fingerprint(model)
        try:
            rnnguard.audit(model, inputs=inputs)
        except BaseException as error:
            # A refusal names what was raised; an interrupt passes through.
            assert isinstance(error, fault) or "broken off" in str(error)
        assert fingerprint(model) == before


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("specimen", JUDGED[::4], ids=lambda s: s.name)
def test_a_probe_that_is_broken_off(
    specimen: Any, fault: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the QR, the products, the gradients: in the middle of what measures."""
    model, inputs = specimen.build(), specimen.inputs()
    for place in ("torch.linalg.qr", "torch.autograd.grad", "torch.linalg.vector_norm"):
        before = fingerprint(model)

        def broken(*_: Any, **__: Any) -> Tensor:
            raise fault("broken off")

        with monkeypatch.context() as patch, pytest.raises(BaseException, match=r"broken off|RG"):
            patch.setattr(place, broken)
            rnnguard.audit(model, inputs=inputs)
        assert fingerprint(model) == before


def _example(root: Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, root / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


EXAMPLES: dict[str, Callable[[Any], tuple[nn.Module, Any]]] = {
    "plain_loop": lambda m: (m.Recall(), torch.randn(4, 12, 5)),
    "own_recurrence": lambda m: (m.OwnLSTM(), torch.randn(4, 12, 5)),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_models(root: Path, name: str) -> None:
    model, x = EXAMPLES[name](_example(root, name))
    optimizer = torch.optim.Adam(model.parameters())
    data = [(x, torch.randint(4, (4,)))] * 3
    before = fingerprint(model, optimizer)
    rnnguard.audit(model, optimizer, data, loss=nn.CrossEntropyLoss(), trial=5)
    assert fingerprint(model, optimizer) == before


def test_a_trial_that_runs_out_of_time() -> None:
    from rnnguard.inspection.batches import given_batches
    from rnnguard.probe.subject import Subject
    from rnnguard.probe.trial import run_trial

    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = [(torch.randn(4, 6), torch.randint(2, (4,)))]
    batches = given_batches(model, data, None, nn.CrossEntropyLoss(), None, 1)
    assert batches is not None
    subject = Subject(model, optimizer, batches, None, None, 0, guarded=False)
    before = fingerprint(model, optimizer)
    trial = run_trial(subject, 10**6, seconds=0.2)
    assert trial.stopped is not None and trial.stopped.stage == "time" and 0 < trial.steps < 10**6
    assert fingerprint(model, optimizer) == before
