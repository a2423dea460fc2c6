"""Pascanu's penalty on torch's kernel: nn.RNN forward, and the penalty on the way back."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from factories import run_readings, site_readings
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

import rnnguard
from rnnguard import nn as cells
from rnnguard.errors import RefusedError
from rnnguard.nn import PenalizedRNN
from rnnguard.nn.retention_penalty import penalty_gradient
from rnnguard.probe.snapshot import fingerprint, same_bits
from rnnguard.records import Change, Plan
from rnnguard.remedies.retention_penalty import RETENTION_PENALTY
from rnnguard.rewrite.edit import Edit

IN, HIDDEN, STEPS, BATCH = 3, 5, 7, 4
LENGTHS = [3, STEPS, 1, 5]
F64 = torch.float64
Loss = Callable[[Any, Tensor], Tensor]
FORMS: dict[str, dict[str, Any]] = {
    "tanh": {},
    "relu": {"nonlinearity": "relu"},
    "both ways": {"bidirectional": True},
    "batch first": {"batch_first": True},
    "without bias": {"bias": False},
}
every_form = pytest.mark.parametrize("form", FORMS)


def pair(weight: float = 2.0, **form: Any) -> tuple[PenalizedRNN, nn.RNN]:
    """The penalized module and torch's own with the same weights, in training."""
    torch.default_generator.manual_seed(0)
    plain = nn.RNN(IN, HIDDEN, **{"dtype": F64, **form})
    mine = copy.deepcopy(plain)
    edit = Edit(mine, None)
    RETENTION_PENALTY.apply(edit, mine, {"weight": weight})
    assert isinstance(mine, PenalizedRNN)
    return mine, plain


def inputs(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape or (STEPS, BATCH, IN), generator=generator, dtype=F64)


def reading(output: Any, last: Tensor) -> Tensor:
    """A loss over all outputs and over the last state, as no two of them count alike."""
    rows = output.data if isinstance(output, PackedSequence) else output
    shares = torch.arange(1, rows.numel() + 1, dtype=rows.dtype).view_as(rows).cos()
    more = torch.arange(1, last.numel() + 1, dtype=last.dtype).view_as(last).sin()
    return (rows * shares).square().mean() + (last * more).tanh().mean()


def back(loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


LOSSES: dict[str, Loss] = {
    "all": reading,
    "outputs alone": lambda output, last: reading(output, last.detach()),
    "last state alone": lambda output, last: (last * last.detach().cos()).mean(),
}


def gradients(
    module: nn.RNN, given: Any, loss: Loss = reading, hx: Any = None
) -> dict[str, Tensor]:
    module.zero_grad()
    back(loss(*module(given, hx)))
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def added(
    weight: float, given: Any, loss: Loss = reading, hx: Any = None, **form: Any
) -> list[Tensor]:
    """What the penalty adds to each recurrent weight; all else is torch's to the bit."""
    mine, plain = pair(weight, **form)
    found, expected = gradients(mine, given, loss, hx), gradients(plain, given, loss, hx)
    recurrent = [name for name in found if name.startswith("weight_hh")]
    assert all(same_bits(found[n], expected[n]) for n in expected if n not in recurrent)
    return [found[name] - expected[name] for name in recurrent]


# --- a computation of its own: one sequence, one step after the other ---------------------


def stepped(plain: nn.RNN, suffix: str, x: Tensor, h: Tensor) -> list[Tensor]:
    """The states (H,) of one sequence x (T, F) in one direction, each a part of one graph."""
    named = dict(plain.named_parameters())
    phi = torch.relu if plain.nonlinearity == "relu" else torch.tanh
    states = [h]
    for row in x if suffix == "l0" else x.flip(0):
        total = named[f"weight_ih_{suffix}"] @ row + named[f"weight_hh_{suffix}"] @ states[-1]
        if plain.bias:
            total = total + named[f"bias_ih_{suffix}"] + named[f"bias_hh_{suffix}"]
        states.append(phi(total))
    return states[1:]


def naive(
    plain: nn.RNN, sequences: list[Tensor], hx: Tensor, together: Any, loss: Loss
) -> list[Tensor]:
    """Omega's gradient by autograd, with deltas and states held; `together` lays out outputs."""
    ways = ["l0", "l0_reverse"][: 2 if plain.bidirectional else 1]
    lanes = {
        (b, way): stepped(plain, way, x, hx[d, b])
        for b, x in enumerate(sequences)
        for d, way in enumerate(ways)
    }
    rows = []
    for b in range(len(sequences)):
        forward, *back = (torch.stack(lanes[b, way]) for way in ways)
        rows.append(torch.cat([forward, *(part.flip(0) for part in back)], -1))
    ends = [torch.stack([lanes[b, way][-1] for b in range(len(sequences))]) for way in ways]
    value = loss(together(rows), torch.stack(ends))
    found: list[Tensor] = []
    for way in ways:
        weight = plain.get_parameter(f"weight_hh_{way}")
        terms = []
        for b in range(len(sequences)):
            states = lanes[b, way]
            deltas = torch.autograd.grad(value, states, retain_graph=True, materialize_grads=True)
            for delta, h in zip(deltas, states, strict=True):
                if float(delta.square().sum()) >= 1e-20:
                    slope = (h > 0).to(h) if plain.nonlinearity == "relu" else 1 - h * h
                    kept = (delta * slope).detach() @ weight
                    terms.append((kept.norm() / delta.norm() - 1).square())
        found += torch.autograd.grad(torch.stack(terms).mean(), weight)
    return found


@every_form
@pytest.mark.parametrize("loss", LOSSES)
def test_the_gradient_is_that_of_a_step_by_step_computation(form: str, loss: str) -> None:
    options, x = FORMS[form], inputs()
    first = bool(options.get("batch_first"))
    _, plain = pair(**options)
    hx = inputs(2 if plain.bidirectional else 1, BATCH, HIDDEN)
    read = LOSSES[loss]
    axis = 0 if first else 1
    expected = naive(plain, [*x.unbind(1)], hx, lambda rows: torch.stack(rows, axis), read)
    mine = added(1.5, x.transpose(0, 1) if first else x, read, hx, **options)
    assert all(float(gradient.norm()) > 1e-3 for gradient in expected)
    for own, other in zip(mine, expected, strict=True):
        torch.testing.assert_close(own, 1.5 * other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("form", ["tanh", "both ways"])
def test_packed_sequences_end_each_at_its_own_step(form: str) -> None:
    x, options = inputs(), FORMS[form]
    sequences = [x[:length, b] for b, length in enumerate(LENGTHS)]
    _, plain = pair(**options)
    hx = inputs(2 if plain.bidirectional else 1, BATCH, HIDDEN)

    def together(rows: list[Tensor]) -> PackedSequence:
        return pack_sequence(rows, enforce_sorted=False)

    expected = naive(plain, sequences, hx, together, reading)
    mine = added(2.0, together(sequences), reading, hx, **options)
    for own, other in zip(mine, expected, strict=True):
        torch.testing.assert_close(own, 2 * other, rtol=1e-9, atol=1e-12)


def test_one_sequence_without_a_batch() -> None:
    x = inputs()
    (alone,) = added(2.0, x[:, 0], lambda y, h: reading(y.unsqueeze(1), h.unsqueeze(1)))
    (batched,) = added(2.0, x[:, :1])
    torch.testing.assert_close(alone, batched, rtol=1e-12, atol=1e-14)


def test_a_step_against_it_lowers_the_penalty() -> None:
    h, dy, hh = inputs(6, 3, HIDDEN).tanh(), inputs(6, 3, HIDDEN), inputs(HIDDEN, HIDDEN)

    def omega(weight: Tensor) -> float:
        back, terms = torch.zeros(3, HIDDEN, dtype=F64), []
        for t in range(5, -1, -1):
            delta = dy[t] + back
            into = delta * (1 - h[t] ** 2)
            back = into @ hh  # deltas are held
            terms.append(((into @ weight).norm(dim=-1) / delta.norm(dim=-1) - 1).square())
        return float(torch.stack(terms).mean())

    gradient = penalty_gradient(h, dy, hh)
    assert omega(hh - 1e-3 * gradient) < omega(hh)
    slope = (omega(hh + 1e-6 * gradient) - omega(hh - 1e-6 * gradient)) / 2e-6
    assert slope == pytest.approx(float(gradient.square().sum()), rel=1e-6)


# --- scale --------------------------------------------------------------------------------


def test_the_scale_of_the_loss_does_not_matter_until_deltas_are_faint() -> None:
    (usual,) = added(2.0, inputs())
    (large,) = added(2.0, inputs(), lambda y, h: 1e3 * reading(y, h))
    torch.testing.assert_close(large, usual, rtol=1e-9, atol=1e-12)
    (none,) = added(2.0, inputs(), lambda y, h: 1e-12 * reading(y, h))
    assert not bool(none.any())


def test_steps_that_nothing_reaches_do_not_count() -> None:
    def early(output: Tensor, _: Tensor) -> Tensor:
        return reading(output[:3], output[2])

    (long,) = added(2.0, inputs(), early)
    (short,) = added(2.0, inputs()[:3], early)
    torch.testing.assert_close(long, short, rtol=1e-12, atol=1e-14)


def test_a_recurrence_of_zeros_has_a_finite_gradient() -> None:
    mine, _ = pair()
    mine.get_parameter("weight_hh_l0").detach().zero_()
    assert bool(gradients(mine, inputs())["weight_hh_l0"].isfinite().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_in_less_precision_and_under_autocast(dtype: torch.dtype) -> None:
    (exact,) = added(2.0, inputs())
    mine, plain = (module.float() for module in pair())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        x = inputs().float()
        found = gradients(mine, x)["weight_hh_l0"] - gradients(plain, x)["weight_hh_l0"]
    assert found.dtype == torch.float32
    tolerance = 0.1 if dtype == torch.bfloat16 else 1e-4
    assert float((found - exact.float()).norm()) < tolerance * float(exact.norm())


# --- nn.RNN in all else -------------------------------------------------------------------


@every_form
@pytest.mark.parametrize("training", [True, False])
def test_forward_and_keys_are_torchs_to_the_bit(form: str, training: bool) -> None:
    mine, plain = (module.train(training) for module in pair(**FORMS[form]))
    assert mine.state_dict().keys() == plain.state_dict().keys()
    sequences = [inputs()[:length, b] for b, length in enumerate(LENGTHS)]
    for given in (inputs(), inputs()[0], pack_sequence(sequences, enforce_sorted=False)):
        (y, h), (expected, last) = mine(given), plain(given)
        assert same_bits(h, last)
        if isinstance(expected, PackedSequence):
            assert all(torch.equal(a, b) for a, b in zip(y, expected, strict=True))  # type: ignore[arg-type]
        else:
            assert same_bits(y, expected) and y.stride() == expected.stride()


@pytest.mark.parametrize("how", ["evaluation", "weight 0", "frozen"])
def test_without_a_penalty_the_gradients_are_torchs_to_the_bit(how: str) -> None:
    mine, plain = pair(0.0 if how == "weight 0" else 2.0)
    for module in (mine, plain):
        module.train(how != "evaluation")
        module.get_parameter("weight_hh_l0").requires_grad_(how != "frozen")
    found, expected = gradients(mine, inputs()), gradients(plain, inputs())
    assert found.keys() == expected.keys()
    assert all(same_bits(found[name], expected[name]) for name in expected)


def test_outputs_may_be_changed_in_place() -> None:
    mine, _ = pair()
    found = gradients(mine, inputs(), lambda y, h: reading(y.mul_(2), h.mul_(2)))
    expected = gradients(mine, inputs(), lambda y, h: reading(2 * y, 2 * h))
    assert all(same_bits(found[name], expected[name]) for name in expected)


def test_a_second_derivative_adds_it_for_what_then_reaches_the_outputs() -> None:
    found, reached = [], []
    for module in pair():
        x = inputs().requires_grad_()
        output, last = module(x)
        wanted = [x, module.get_parameter("weight_ih_l0"), module.get_parameter("weight_hh_l0")]
        first = torch.autograd.grad(reading(output, last), wanted[:2], create_graph=True)
        total = first[0].square().sum() + first[1].square().sum()
        reached = list(torch.autograd.grad(total, [output, last], retain_graph=True))
        found.append([output.detach(), *torch.autograd.grad(total, wanted)])
    (h, *mine), (_, *theirs) = found
    for own, other in zip(mine[:2], theirs[:2], strict=True):
        torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-14)
    dy, dlast = reached
    dy[-1] += dlast[0]
    weight = pair()[1].get_parameter("weight_hh_l0").detach()
    expected = 2 * penalty_gradient(h, dy, weight)
    torch.testing.assert_close(mine[2] - theirs[2], expected, rtol=1e-9, atol=1e-12)


def test_functional_gradients_hold_it_and_so_do_those_of_each_sample() -> None:
    mine, _ = pair()
    weights = {name: p.detach() for name, p in mine.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return reading(*functional_call(mine, weights, (x,)))

    expected = gradients(mine, inputs())
    for name, found in grad(loss)(weights, inputs()).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-12, atol=1e-14)
    rows = inputs().unsqueeze(2)  # (T, B, 1, F): a batch of one for each sample
    each = vmap(grad(loss), in_dims=(None, 1))(weights, rows)["weight_hh_l0"]
    for b in range(BATCH):
        alone = gradients(mine, inputs()[:, b : b + 1])["weight_hh_l0"]
        torch.testing.assert_close(each[b], alone, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_gradients_in_batches_hold_it_and_forward_mode_is_torchs() -> None:
    mine, plain = pair()
    output, weight = mine(inputs())[0], mine.get_parameter("weight_hh_l0")
    cotangents = inputs(2, STEPS, BATCH, HIDDEN)
    (batched,) = torch.autograd.grad(
        output, weight, cotangents, is_grads_batched=True, retain_graph=True
    )
    for found, cotangent in zip(batched, cotangents, strict=True):
        (alone,) = torch.autograd.grad(output, weight, cotangent, retain_graph=True)
        torch.testing.assert_close(found, alone, rtol=1e-12, atol=1e-14)
    moved = [jvp(lambda x, m=m: m(x)[0], (inputs(),), (inputs().cos(),))[1] for m in (mine, plain)]
    torch.testing.assert_close(*moved, rtol=0, atol=0)


def test_compiled_it_trains_with_the_penalty() -> None:
    mine, _ = pair()
    expected = gradients(mine, inputs())["weight_hh_l0"]
    mine.zero_grad()
    torch.compiler.reset()
    back(reading(*torch.compile(mine, backend="eager")(inputs())))
    found = mine.get_parameter("weight_hh_l0").grad
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.filterwarnings("ignore:The tensor attributes self._flat_weights")
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("training", [True, False])
def test_exported_and_traced_it_is_torchs(training: bool) -> None:
    mine, plain = (module.train(training) for module in pair(batch_first=True))
    x = inputs(BATCH, STEPS, IN)
    shapes = ({0: torch.export.Dim("batch")}, None)
    exported = torch.export.export(mine, (x[:2], None), dynamic_shapes=shapes)
    traced = torch.jit.trace(mine, (x[:2],), check_trace=False)  # type: ignore[no-untyped-call]
    for made in (exported.module()(x, None), traced(x)):
        torch.testing.assert_close(made, plain(x), rtol=1e-12, atol=1e-14)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_script_of_it_is_refused() -> None:
    with pytest.raises(RefusedError, match="RG923"):
        torch.jit.script(pair()[0])


def test_a_copy_a_pickle_and_a_checkpointed_run_keep_it() -> None:
    mine, _ = pair(3.0)
    expected = gradients(mine, inputs())["weight_hh_l0"]
    file = io.BytesIO()
    torch.save(mine, file)
    file.seek(0)
    for again in (copy.deepcopy(mine), torch.load(file, weights_only=False)):
        assert same_bits(gradients(again, inputs())["weight_hh_l0"], expected)
    mine.zero_grad()
    back(reading(*checkpoint(mine, inputs(), use_reentrant=False)))
    found = mine.get_parameter("weight_hh_l0").grad
    assert found is not None and same_bits(found, expected)


@pytest.mark.parametrize("weight", [-1.0, float("inf"), float("nan")])
def test_a_weight_that_makes_no_sense_is_an_error(weight: float) -> None:
    with pytest.raises(ValueError, match="weight must be finite"):
        PenalizedRNN(IN, HIDDEN, weight=weight)


def test_built_by_hand_it_takes_what_nn_rnn_takes() -> None:
    module = PenalizedRNN(IN, HIDDEN, nonlinearity="relu", batch_first=True, weight=4.0)
    assert "weight=4.0" in str(module)
    assert module(torch.randn(2, 3, IN))[0].shape == (2, 3, HIDDEN)
    with pytest.raises(ValueError, match="one layer"):
        PenalizedRNN(IN, HIDDEN, num_layers=2)


# --- the remedy ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "site", "precision", "expected"),
    [
        ({}, {"cell": "rnn_tanh"}, "fp32", {"weight": 2.0}),
        ({"weight": 0.5}, {"cell": "rnn_relu", "bidirectional": True}, "fp32", {"weight": 0.5}),
        ({}, {"cell": "lstm"}, "fp32", None),
        ({}, {"cell": "custom"}, "fp32", None),
        ({}, {"cell": "rnn_tanh", "layers": 2}, "fp32", None),
        ({}, {"cell": "rnn_tanh", "remade": True}, "fp32", None),
        ({}, {"cell": "rnn_tanh"}, "fp16", None),
    ],
)
def test_it_is_for_a_plain_rnn_of_one_layer(
    wanted: dict[str, Any], site: dict[str, Any], precision: Any, expected: dict[str, Any] | None
) -> None:
    run = run_readings(precision=precision)
    assert RETENTION_PENALTY.prescribe(wanted, site_readings(**site), run) == expected
    assert RETENTION_PENALTY.prescribe({}, None, run) is None


def test_other_modules_are_left_alone() -> None:
    others: list[nn.Module] = [nn.RNN(IN, HIDDEN, num_layers=2), nn.RNNCell(IN, HIDDEN)]
    others += [nn.GRU(IN, HIDDEN), cells.ResidualRNN(IN, HIDDEN), pair()[0]]
    others += [type("Own", (nn.RNN,), {})(IN, HIDDEN)]
    for module in others:
        edit = Edit(module, None)
        RETENTION_PENALTY.apply(edit, module, {})
        assert edit.mark() == 0


def test_a_plan_morphs_in_place_and_is_undone_after_training() -> None:
    model = nn.Sequential(nn.RNN(IN, HIDDEN, bidirectional=True))
    rnn, optimizer = model[0], SGD(model.parameters(), 0.1, momentum=0.9)
    before, keys = fingerprint(model, optimizer), model.state_dict().keys()
    change = Change(remedy="retention_penalty", path="0", tier="structure", dose={"weight": 3.0})
    plan = Plan.from_json(Plan(changes=(change,)).to_json())
    report = rnnguard.apply(model, optimizer, plan)
    assert [change.outcome for change in report.changes] == ["applied"]
    assert model[0] is rnn and type(rnn) is PenalizedRNN
    assert rnn.penalty.weight == 3.0 and model.state_dict().keys() == keys
    assert rnnguard.apply(model, optimizer, plan).changes == ()
    report.undo()
    assert type(rnn) is nn.RNN and fingerprint(model, optimizer) == before
    again = rnnguard.apply(model, optimizer, plan)
    back(reading(*model(torch.randn(STEPS, BATCH, IN))))
    optimizer.step()
    again.undo(structure=True)
    assert type(model[0]) is nn.RNN


def test_the_audit_sees_a_plain_rnn_in_it() -> None:
    class Reader(nn.Module):
        def __init__(self, rnn: nn.RNN) -> None:
            super().__init__()
            self.rnn, self.head = rnn, nn.Linear(HIDDEN, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.rnn(x)[0][-1])
            return out

    torch.manual_seed(0)
    data = [(torch.randn(12, 4, IN), torch.randint(2, (4,)))]
    found = []
    for rnn in pair(dtype=torch.float32):
        torch.manual_seed(0)
        model = Reader(rnn)
        report = rnnguard.audit(model, data=data, loss=nn.CrossEntropyLoss(), memory=8)
        found.append(report["rnn"])
    mine, plain = found
    assert mine.readout == plain.readout == "last_step"
    assert mine.retention == plain.retention and mine.cell == plain.cell
