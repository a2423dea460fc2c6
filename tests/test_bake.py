"""Baking: the same function and the same objects, with torch's own classes only."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rewritten import HIDDEN, IN, KINDS, LENGTHS, Net, PackedNet, batch, normed, plain, rewritten
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.optim.swa_utils import AveragedModel

import rnnguard
from rnnguard.baking import BAKED, is_baked
from rnnguard.errors import RefusedError, RewriteError, RNNGuardWarning, UndoError
from rnnguard.nn import OutputNormLSTM
from rnnguard.nn.output_norm import OUTPUT_NORMS

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported"),
    # torch.export, about every recurrent module of torch.
    pytest.mark.filterwarnings("ignore:The tensor attributes self.rnn._flat_weights"),
    # TorchScript and quantised tensors are on their way out, and say so at every use.
    pytest.mark.filterwarnings("ignore:.*torch.(jit|ao).*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
    # The tracer of TorchScript, about torch's own checks of sizes.
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]
every_kind = pytest.mark.parametrize("kind", KINDS)
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "deep and bidirectional": {"num_layers": 2, "bidirectional": True},
}


def packed_input() -> PackedSequence:
    return pack_padded_sequence(batch(), LENGTHS, batch_first=True, enforce_sorted=False)


def identities(model: nn.Module) -> dict[str, int]:
    return {
        **{name: id(module) for name, module in model.named_modules()},
        **{name: id(value) for name, value in model.state_dict(keep_vars=True).items()},
    }


# --- what stays the same -----------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("form", FORMS)
def test_same_outputs_objects_and_keys_in_torchs_own_class(kind: str, form: str) -> None:
    model, x = rewritten(kind, **FORMS[form]), batch()
    expected, before = model(x), identities(model)
    baked = rnnguard.bake(model)
    assert baked.paths == ("rnn",) and baked.refusals == ()
    assert type(model.rnn) is KINDS[kind]
    assert torch.equal(model(x), expected)
    assert identities(model) == before


def test_projected() -> None:
    model, x = rewritten("lstm", proj_size=3), batch()
    expected = model(x)
    rnnguard.bake(model)
    assert torch.equal(model(x), expected)


@every_kind
@pytest.mark.parametrize("form", FORMS)
def test_packed_sequences_of_the_named_paths(kind: str, form: str) -> None:
    model, packed = rewritten(kind, **FORMS[form]), packed_input()
    output, state = model.rnn(packed)
    rnnguard.bake(model, packed=["rnn"])
    got, got_state = model.rnn(packed)
    for mine, theirs in zip(got, output, strict=True):
        assert torch.equal(mine, theirs)
    torch.testing.assert_close(got_state, state, rtol=0, atol=0)


def test_the_wrong_kind_of_input_is_loud() -> None:
    """The hook cannot ask what it was given, so it must at least never pass it unnormed."""
    model = rewritten("gru")
    rnnguard.bake(model)
    with pytest.raises(TypeError, match="PackedSequence"):
        model.rnn(packed_input())
    model = rewritten("gru", PackedNet)
    rnnguard.bake(model, packed="rnn")
    with pytest.raises(AttributeError, match="_replace"):
        model.rnn(batch())


def test_gradients_are_the_morphs() -> None:
    model, x = rewritten("lstm"), batch()
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        rnnguard.bake(model) if not is_baked(model.rnn) else None
    for mine, theirs in zip(*gradients, strict=True):
        assert torch.equal(mine, theirs)


def test_hooks_see_the_normed_output_as_before() -> None:
    model, x, seen = rewritten("lstm"), batch(), []
    model.rnn.register_forward_hook(lambda module, args, results: seen.append(results[0]))
    model(x)
    rnnguard.bake(model)
    model(x)
    assert torch.equal(*seen)


def test_a_root_and_its_aliases_are_baked_once() -> None:
    lstm = normed(nn.LSTM(IN, HIDDEN, batch_first=True), "")
    model, packed = nn.ModuleDict({"a": lstm, "b": lstm}), packed_input()
    expected = lstm(packed)[0].data
    assert rnnguard.bake(model, packed=["b"]).paths == ("a",)
    assert len(lstm._forward_hooks) == 1
    assert torch.equal(lstm(packed)[0].data, expected)
    assert rnnguard.bake(lstm).earlier == ("",)


def test_training_goes_on_in_the_same_parameters() -> None:
    model, x = rewritten("gru"), batch()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    rnnguard.bake(model)
    before = model.rnn.output_norm.weight.detach().clone()
    model(x).sum().backward()
    optimizer.step()
    assert not torch.equal(model.rnn.output_norm.weight, before)


# --- without rnnguard --------------------------------------------------------------------

LOAD = """
import sys
sys.modules["rnnguard"] = None  # any import of it fails
import torch
for name in ("plain", "packed"):
    try:
        torch.load(f"{name}-rewritten.pt", weights_only=False)
    except ModuleNotFoundError as error:
        assert "rnnguard" in str(error)
    else:
        raise AssertionError("the rewritten model needs rnnguard")
    model = torch.load(f"{name}-baked.pt", weights_only=False)
    given, expected = torch.load(f"{name}.pt", weights_only=False)
    for kind, result in expected.items():
        assert torch.equal(model[kind](given)[0][0], result), (name, kind)
print("same")
"""


def test_a_pickle_loads_and_runs_where_rnnguard_cannot_be_imported(
    fresh_python: Callable[..., str], tmp_path: Path
) -> None:
    for name, given in (("plain", batch()), ("packed", packed_input())):
        model = nn.ModuleDict({kind: plain(kind, bidirectional=True).rnn for kind in KINDS})
        for kind in KINDS:
            normed(model, kind)
        torch.save(model, tmp_path / f"{name}-rewritten.pt")
        torch.save((given, {k: m(given)[0][0] for k, m in model.items()}), tmp_path / f"{name}.pt")
        rnnguard.bake(model, packed=list(KINDS) if name == "packed" else ())
        torch.save(model, tmp_path / f"{name}-baked.pt")
    assert fresh_python("-c", LOAD).strip() == "same"


def test_copies_keep_their_own_norm(tmp_path: Path) -> None:
    model, x = rewritten("lstm"), batch()
    rnnguard.bake(model)
    torch.save(model, tmp_path / "model.pt")
    expected = model(x)
    for twin in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(twin(x), expected)
        nn.init.zeros_(twin.rnn.output_norm.weight)
        assert not torch.equal(twin(x), expected)
        assert torch.equal(model(x), expected)
        assert rnnguard.bake(twin).earlier == ("rnn",)


def test_what_torch_can_do_with_it() -> None:
    model, x, other = rewritten("lstm").eval(), batch(), batch(3, 7)
    expected = model(x)
    rnnguard.bake(model)
    assert torch.equal(torch.export.export(model, (x,)).module()(x), expected)
    assert torch.equal(torch.fx.symbolic_trace(model)(other), model(other))
    assert torch.equal(torch.jit.trace(model, (x,))(other), model(other))
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    torch.testing.assert_close(quantised(x), expected, rtol=0, atol=0.1)


def test_what_torch_cannot_do_with_it_is_loud() -> None:
    model = rewritten("lstm").eval()
    rnnguard.bake(model)
    with pytest.raises(AttributeError, match="__name__"):
        torch.jit.script(model)
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.LSTM})
    with pytest.raises(AttributeError, match="output_norm"):
        quantised(batch())


# --- again, and back ---------------------------------------------------------------------


def test_twice_is_once() -> None:
    model, x = rewritten("lstm"), batch()
    rnnguard.bake(model)
    expected = model(x)
    again = rnnguard.bake(model)
    assert (again.paths, again.earlier) == ((), ("rnn",))
    assert len(model.rnn._forward_hooks) == 1
    assert torch.equal(model(x), expected)
    again.undo()
    assert is_baked(model.rnn)


@every_kind
def test_undo_gives_the_class_back_even_after_training(kind: str) -> None:
    model, x = rewritten(kind), batch()
    before = identities(model)
    baked = rnnguard.bake(model)
    nn.init.ones_(model.rnn.bias_ih_l0)
    expected = model(x)
    for _ in range(2):
        baked.undo()
        assert type(model.rnn) is OUTPUT_NORMS[KINDS[kind]]
        assert not model.rnn._forward_hooks
        assert torch.equal(model(x), expected) and identities(model) == before


def test_the_rewrite_is_undone_after_the_bake_and_not_before() -> None:
    model, x = plain("lstm"), batch()
    expected = model(x)
    plan = {"remedy": "layer_norm", "path": "rnn", "tier": "structure", "dose": {}}
    row = {**plan, "scenario": "a test", "why": ""}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    report = rnnguard.apply(model, optimizer, {"schema_version": 1, "changes": [row]})
    baked = rnnguard.bake(model)
    normed = model(x)
    with pytest.raises(UndoError, match="has become a LSTM since"):
        report.undo()
    assert torch.equal(model(x), normed)
    baked.undo()
    report.undo()
    assert type(model.rnn) is nn.LSTM and not model.rnn._forward_hooks
    assert torch.equal(model(x), expected)


def test_undo_does_not_drop_what_the_user_has_put_on_since() -> None:
    model = rewritten("lstm")
    baked = rnnguard.bake(model)
    parametrizations.orthogonal(model.rnn, "weight_hh_l0")
    kept = type(model.rnn)
    with pytest.raises(UndoError) as caught:
        baked.undo()
    assert caught.value.code == "RG917" and type(model.rnn) is kept


def test_an_error_in_the_middle_restores(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.ModuleDict({"a": rewritten("lstm"), "b": rewritten("gru")})
    register, before = nn.Module.register_forward_hook, identities(model)

    def failing(module: nn.Module, *args: Any, **options: Any) -> Any:
        if isinstance(module, nn.GRU):
            raise MemoryError
        return register(module, *args, **options)

    monkeypatch.setattr(nn.Module, "register_forward_hook", failing)
    with pytest.raises(RewriteError):
        rnnguard.bake(model)
    assert [type(m.rnn) for m in model.values()] == [OutputNormLSTM, OUTPUT_NORMS[nn.GRU]]
    assert not any(module._forward_hooks for module in model.modules())
    assert identities(model) == before


# --- what is told and what is refused ----------------------------------------------------


def test_nothing_to_bake_is_told() -> None:
    model = plain("lstm")
    with pytest.warns(RNNGuardWarning, match="Nothing to bake"):
        baked = rnnguard.bake(model)
    assert baked.paths == baked.earlier == baked.refusals == ()


class Mine(OutputNormLSTM):
    pass


def test_a_class_on_top_stays_and_is_told() -> None:
    model = nn.ModuleDict({"own": rewritten("lstm"), "free": rewritten("gru")})
    model["own"].rnn.__class__ = Mine
    with pytest.warns(RNNGuardWarning, match="RG922"):
        baked = rnnguard.bake(model)
    assert baked.paths == ("free.rnn",)
    (refusal,) = baked.refusals
    assert (refusal.code, refusal.path) == ("RG922", "own.rnn") and "Mine" in refusal.fact
    assert "`free.rnn` is torch's own class again." in str(baked) and str(refusal) in str(baked)
    assert type(model["own"].rnn) is Mine


def test_a_class_that_cannot_be_plain_gives_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    why = "its norm lies inside the recurrence"
    monkeypatch.setattr("rnnguard.baking.BAKED", {OutputNormLSTM: why})
    with pytest.warns(RNNGuardWarning, match=why):
        baked = rnnguard.bake(rewritten("lstm"))
    assert [refusal.path for refusal in baked.refusals] == ["rnn"]


def test_every_module_of_rnnguard_is_baked_or_has_a_reason() -> None:
    public = [value for value in vars(rnnguard.nn).values() if isinstance(value, type)]
    modules = {value for value in public if issubclass(value, nn.Module)}
    assert modules and modules == set(BAKED)
    assert all(isinstance(plain, type) or plain.strip() for plain in BAKED.values())


def wrapped() -> nn.Module:
    return nn.DataParallel(rewritten("lstm"))


def compiled() -> nn.Module:
    model = rewritten("lstm")
    model.compile()
    return model


def scripted() -> nn.Module:
    return nn.ModuleList([rewritten("lstm"), torch.jit.script(plain("lstm"))])


@pytest.mark.parametrize(
    ("build", "code"), [(wrapped, "RG901"), (compiled, "RG909"), (scripted, "RG908")]
)
def test_bound_models_are_refused_untouched(build: Callable[[], nn.Module], code: str) -> None:
    model = build()
    with pytest.raises(RefusedError) as caught:
        rnnguard.bake(model)
    assert caught.value.code == code and "`module`" in caught.value.cure
    assert any(isinstance(module, OutputNormLSTM) for module in model.modules())


def test_an_average_is_deployed_by_the_model_inside() -> None:
    average, x = AveragedModel(rewritten("lstm")), batch()
    expected = average(x)
    with pytest.raises(RefusedError):
        rnnguard.bake(average)
    assert rnnguard.bake(average.module).paths == ("rnn",)
    assert torch.equal(average.module(x), expected)


def test_paths_that_lead_nowhere_are_refused_untouched() -> None:
    model = rewritten("lstm")
    with pytest.raises(RefusedError) as caught:
        rnnguard.bake(model, packed=["rn", "head"])
    assert [reason.code for reason in caught.value.reasons] == ["RG914", "RG914"]
    assert "'rnn'" in str(caught.value) and type(model.rnn) is OutputNormLSTM


def test_a_change_of_mind_about_packing_is_refused() -> None:
    model = rewritten("lstm")
    baked = rnnguard.bake(model)
    with pytest.raises(RefusedError) as caught:
        rnnguard.bake(model, packed="rnn")
    assert caught.value.code == "RG922"
    baked.undo()
    assert rnnguard.bake(model, packed="rnn").paths == ("rnn",)


class LastStep(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, -1]


def test_a_baked_model_is_seen_as_normed_and_gets_no_second_norm() -> None:
    model = rewritten("lstm", LastStep)
    rnnguard.bake(model)
    optimizer = torch.optim.Adam(model.parameters())
    report = rnnguard.stabilize(model, optimizer, inputs=1e-3 * batch(6, 12), memory=12)
    assert report.before["rnn"].normalized
    assert "layer_norm" not in [change.remedy for change in report.changes]
    assert type(model.rnn) is nn.LSTM
