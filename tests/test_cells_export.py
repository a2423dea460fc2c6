"""A model with a cell of rnnguard.nn leaves Python: traced, compiled, as ONNX, by torch.fx."""

from __future__ import annotations

import io
from typing import Any

import onnx
import pytest
import torch
from cell_cases import CELLS
from fused_cases import AT_WORK, KINDS, fused
from onnx.reference import ReferenceEvaluator
from test_export import EXPORTERS_SAY
from torch import Tensor, fx, nn

from rnnguard.nn import Tracer

pytestmark = [
    *EXPORTERS_SAY,
    pytest.mark.filterwarnings("ignore:Constant folding"),
    # torch.compile, about what it goes on with after each recurrence of torch as well.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]
IN, HIDDEN, STEPS, BATCH = 4, 5, 6, 3
AROUND = {name: children for name, children in AT_WORK.items() if name != "all"}
# Torch's exporter for ONNX has no operator for what makes their recurrent weights.
NOT_TO_ONNX = {"orthogonal", "spectral bound", "bounded rnn"}
EVERY = [*CELLS, *AROUND]
every_module = pytest.mark.parametrize("name", EVERY)


class Net(nn.Module):
    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.rnn = rnn
        self.head = nn.Linear(HIDDEN, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.rnn(x)[0][:, -1])
        return out


def net(name: str) -> Net:
    torch.manual_seed(0)
    options: dict[str, Any] = {"num_layers": 2, "batch_first": True}
    if name in CELLS:
        return Net(CELLS[name](IN, HIDDEN, **options)).eval()
    return Net(fused("lstm", AROUND[name], IN, HIDDEN, **options)).eval()


def batch(size: int = BATCH) -> Tensor:
    return torch.randn(size, STEPS, IN)


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@every_module
def test_traced_it_takes_any_batch(name: str) -> None:
    model, other = net(name), batch(7)
    same(torch.jit.trace(model, (batch(),))(other), model(other))


@every_module
def test_exported_it_takes_any_batch(name: str) -> None:
    model, other = net(name), batch(7)
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(model, (batch(),), dynamic_shapes=shapes)
    same(program.module()(other), model(other))


@every_module
def test_in_a_compiled_model(name: str) -> None:
    model, x = net(name), batch()
    torch.compiler.reset()
    same(torch.compile(model, backend="eager")(x), model(x))


@every_module
def test_traced_by_fx(name: str) -> None:
    model, x = net(name), batch()
    same(fx.GraphModule(model, Tracer().trace(model))(x), model(x))


@pytest.mark.parametrize("name", [name for name in EVERY if name not in NOT_TO_ONNX])
def test_as_onnx(name: str) -> None:
    model, x, file = net(name), batch(), io.BytesIO()
    torch.onnx.export(model, (x,), file, dynamo=False)
    graph = onnx.load_model_from_string(file.getvalue())
    (found,) = ReferenceEvaluator(graph).run(None, {graph.graph.input[0].name: x.numpy()})
    same(torch.from_numpy(found), model(x).detach())


@pytest.mark.parametrize("name", sorted(NOT_TO_ONNX))
def test_what_onnx_cannot_have_is_an_error(name: str) -> None:
    with pytest.raises(torch.onnx.errors.OnnxExporterError):
        torch.onnx.export(net(name), (batch(),), io.BytesIO(), dynamo=False)


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_between_layers_compiles_for_every_kernel(kind: str) -> None:
    model = Net(fused(kind, AROUND["norm"], IN, HIDDEN, num_layers=2, batch_first=True)).eval()
    x = batch()
    torch.compiler.reset()
    same(torch.compile(model, backend="eager")(x), model(x))
