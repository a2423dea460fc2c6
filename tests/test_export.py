"""What torch does with a rewritten model: save, export, trace, compile, transform; in numbers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from factories import recorded
from onnx.reference import ReferenceEvaluator
from rewritten import (
    BATCH,
    HIDDEN,
    KINDS,
    LENGTHS,
    PackedNet,
    batch,
    normed,
    plain,
    rewritten,
)
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import layer_norm

from rnnguard.errors import RefusedError
from rnnguard.nn.output_norm import OUTPUT_NORMS

EXPORTERS_SAY = [
    # torch says so once per process about its own projections.
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported"),
    # torch.export, about every recurrent module of torch.
    pytest.mark.filterwarnings("ignore:The tensor attributes self.rnn._flat_weights"),
    # TorchScript and torch.ao are on their way out, and say so at every use.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch"),
    pytest.mark.filterwarnings("ignore:.*torch.(jit|ao).*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript-based"),
    pytest.mark.filterwarnings("ignore:Exporting a model to ONNX with a batch_size other than 1"),
    # The tracers read sizes and lengths as numbers; packing makes torch do so itself.
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]
pytestmark = EXPORTERS_SAY
every_kind = pytest.mark.parametrize("kind", KINDS)
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "deep": {"num_layers": 2},
    "bidirectional": {"bidirectional": True},
}
every_form = pytest.mark.parametrize("form", FORMS)


# --- checkpoints -------------------------------------------------------------------------


@every_kind
def test_keys_and_values_of_the_old_parameters_are_unchanged(kind: str) -> None:
    before = plain(kind, num_layers=2, bidirectional=True)
    old = {name: value.clone() for name, value in before.state_dict().items()}
    after = normed(before).state_dict()
    assert [name for name in after if "output_norm" not in name] == list(old)
    assert [name for name in after if "output_norm" in name] == [
        "rnn.output_norm.weight",
        "rnn.output_norm.bias",
    ]
    assert all(torch.equal(after[name], value) for name, value in old.items())


@every_kind
def test_saved_and_loaded_in_every_way(kind: str, tmp_path: Path) -> None:
    model, x = rewritten(kind), batch()
    expected = model(x)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    torch.save(model, tmp_path / "model.pt")
    fresh = rewritten(kind)
    assert not torch.equal(fresh(x), expected)
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(fresh(x), expected)
    assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=False)(x), expected)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), expected)
    nn.init.zeros_(twin.rnn.output_norm.weight)
    assert torch.equal(model(x), expected) and not torch.equal(twin(x), expected)


# --- export ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "strict"), [("rnn", False), ("lstm", False), ("gru", False), ("lstm", True)]
)
def test_exported_with_the_batch_left_open(kind: str, strict: bool) -> None:
    """Steps are counted off while exporting, as they are for torch's own modules."""
    model = rewritten(kind).eval()
    open_batch = ({0: torch.export.Dim("batch", min=2, max=64)},)
    program = torch.export.export(model, (batch(),), dynamic_shapes=open_batch, strict=strict)
    for count in (BATCH, 3):
        x = batch(count)
        torch.testing.assert_close(program.module()(x), model(x))
    assert set(program.state_dict) == set(model.state_dict())


@every_kind
@every_form
def test_onnx_with_batch_and_time_left_open(kind: str, form: str, tmp_path: Path) -> None:
    model = rewritten(kind, **FORMS[form]).eval()
    assert_same_in_onnx(model, (batch(),), (batch(3, 7),), tmp_path)


@every_kind
@every_form
def test_onnx_of_packed_sequences(kind: str, form: str, tmp_path: Path) -> None:
    """Padding must come out as torch's, not as the norm's bias."""
    model = rewritten(kind, PackedNet, **FORMS[form]).eval()
    exported, other = (batch(), LENGTHS), (batch(3, 7), torch.tensor([2, 7, 4]))
    if form == "bidirectional":
        pytest.importorskip("onnxruntime", reason="onnx's own evaluator ignores the lengths")
    assert_same_in_onnx(model, exported, other, tmp_path)


def assert_same_in_onnx(
    model: nn.Module, exported: tuple[Tensor, ...], other: tuple[Tensor, ...], folder: Path
) -> None:
    """The TorchScript-based exporter's file, run by a runtime or else by onnx itself."""
    file, names = folder / "model.onnx", ["x", "lengths"][: len(exported)]
    axes = {"x": {0: "batch", 1: "time"}, "y": {0: "batch", 1: "time"}, "lengths": {0: "batch"}}
    torch.onnx.export(
        model,
        exported,
        file,
        input_names=names,
        output_names=["y"],
        dynamic_axes={name: axes[name] for name in (*names, "y")},
        dynamo=False,
    )
    kinds = {node.op_type for node in onnx.load(file).graph.node}
    assert {"LayerNormalization"} <= kinds and kinds & {"RNN", "LSTM", "GRU"}
    for given in (exported, other):
        torch.testing.assert_close(run_onnx(file, given), model(*given), rtol=1e-4, atol=1e-5)


def run_onnx(file: Path, given: tuple[Tensor, ...]) -> Tensor:
    try:
        from onnxruntime import InferenceSession
    except ModuleNotFoundError:
        session: Any = ReferenceEvaluator(str(file))
        names = session.input_names
    else:
        session = InferenceSession(str(file), providers=["CPUExecutionProvider"])
        names = [put.name for put in session.get_inputs()]
    feed = {name: value.numpy() for name, value in zip(names, given, strict=True)}
    return torch.from_numpy(session.run(None, feed)[0])


@every_kind
@pytest.mark.filterwarnings("ignore::FutureWarning:torch")
@pytest.mark.filterwarnings("ignore:.*treespec.*is deprecated:FutureWarning")
def test_onnx_by_way_of_torch_export(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="what torch.onnx.export(dynamo=True) needs")
    model, x, file = rewritten(kind).eval(), batch(), tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), file, dynamo=True, verbose=False)
    torch.testing.assert_close(run_onnx(file, (x,)), model(x), rtol=1e-4, atol=1e-5)


@every_kind
def test_traced(kind: str) -> None:
    model = rewritten(kind, bidirectional=True).eval()
    traced, x = torch.jit.trace(model, (batch(),)), batch(3, 7)
    assert torch.equal(traced(x), model(x))


@every_kind
def test_scripting_is_refused_by_name(kind: str) -> None:
    model, x = rewritten(kind), batch()
    expected = model(x)
    with pytest.raises(RefusedError) as caught:
        torch.jit.script(model)
    assert caught.value.code == "RG923" and "torch.jit.trace" in str(caught.value)
    assert type(model.rnn).__name__ in str(caught.value)
    assert torch.equal(model(x), expected)


def test_compiled() -> None:
    model, packed, x = rewritten("lstm"), rewritten("gru", PackedNet), batch()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    compiled = torch.compile(packed, backend="aot_eager")
    torch.testing.assert_close(compiled(x, LENGTHS), packed(x, LENGTHS))


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_dynamic_quantisation_leaves_the_recurrence_as_it_is(kind: str) -> None:
    """torch.ao goes by exact class; what it does not know, it keeps in floats."""
    model, x = rewritten(kind).eval(), batch()
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.LSTM, nn.GRU, nn.Linear})
    assert type(quantised.rnn) is OUTPUT_NORMS[KINDS[kind]]
    assert type(quantised.head) is torch.ao.nn.quantized.dynamic.Linear
    assert torch.equal(quantised.rnn(x)[0], model.rnn(x)[0])
    torch.testing.assert_close(quantised(x), model(x), rtol=0, atol=0.1)


# --- recorded and traced by this package -------------------------------------------------


@every_kind
def test_a_recording_holds_one_native_call_and_one_norm(kind: str) -> None:
    model = rewritten(kind)
    recording = recorded(model, batch())
    (call,) = recording.calls
    assert call.module is model.rnn
    names = [node.meta.get("name") for node in recording.graph.nodes]
    assert names.count("layer_norm") == 1


# --- transforms of torch.func ------------------------------------------------------------


@every_kind
def test_other_weights_through_functional_call(kind: str) -> None:
    model, x = rewritten(kind).double(), batch().double()
    given = {name: torch.randn_like(value) for name, value in model.named_parameters()}
    twin = plain(kind).double()
    twin.load_state_dict({n: v for n, v in given.items() if "output_norm" not in n})
    output = layer_norm(
        twin.rnn(x)[0],
        (HIDDEN,),
        given["rnn.output_norm.weight"],
        given["rnn.output_norm.bias"],
        model.rnn.output_norm.eps,
    )
    torch.testing.assert_close(functional_call(model, given, (x,)), twin.head(output))


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no such kernel")
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_of_each_sample_where_torchs_kernel_has_them() -> None:
    model, x = rewritten("lstm"), batch()
    weights = {name: value.detach() for name, value in model.named_parameters()}

    def loss(given: dict[str, Tensor], sample: Tensor) -> Tensor:
        total: Tensor = functional_call(model, given, (sample.unsqueeze(0),)).square().sum()
        return total

    got = vmap(grad(loss), in_dims=(None, 0))(weights, x)
    for index, sample in enumerate(x):
        model.zero_grad()
        model(sample.unsqueeze(0)).square().sum().backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(got[name][index], parameter.grad)
