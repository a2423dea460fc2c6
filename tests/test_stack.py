"""What torch's own modules promise, every cell keeps."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from cell_cases import (
    BATCH,
    CELLS,
    DEEP,
    F64,
    HIDDEN,
    IN,
    LENGTHS,
    STEPS,
    WITHOUT_KEYS,
    build,
    carries_cell,
    close,
    drawn,
    flat,
    initial,
    of_sequence,
    plain_of,
    ragged,
    states_of,
)
from torch import Tensor, fx, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from rnnguard.errors import RefusedError, RNNGuardWarning
from rnnguard.nn.stack import Stack

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")

every_cell = pytest.mark.parametrize("name", CELLS)
with_keys = pytest.mark.parametrize("name", sorted(set(CELLS) - WITHOUT_KEYS))
lstms = pytest.mark.parametrize("name", [name for name in CELLS if name.endswith("lstm")])


def given(*shape: int) -> Tensor:
    return torch.randn(*(shape or (STEPS, BATCH, IN)), dtype=F64)


@every_cell
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("form", [{}, DEEP], ids=["plain", "deep"])
def test_packed_equals_each_sequence_alone(
    name: str, batch_first: bool, form: dict[str, Any]
) -> None:
    module = build(name, batch_first=batch_first, **form)
    sequences, packed = ragged(batch_first)
    hx = initial(module, BATCH)
    output, state = module(packed, hx)
    assert isinstance(output, PackedSequence)
    for field in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        assert torch.equal(getattr(output, field), getattr(packed, field))
    rows, lengths = pad_packed_sequence(output, batch_first=True)
    assert lengths.tolist() == LENGTHS
    for index, sequence in enumerate(sequences):
        alone, last = module(sequence, of_sequence(hx, index))
        close(rows[index, : len(sequence)], alone)
        close(of_sequence(state, index), last)


@lstms
def test_packed_and_projected_equals_each_sequence_alone(name: str) -> None:
    module = build(name, proj_size=2, **DEEP)
    sequences, packed = ragged()
    output, state = module(packed)
    rows, _ = pad_packed_sequence(output, batch_first=True)
    for index, sequence in enumerate(sequences):
        alone, last = module(sequence)
        close(rows[index, : len(sequence)], alone)
        close(of_sequence(state, index), last)


@every_cell
def test_a_bidirectional_cell_is_two(name: str) -> None:
    both = build(name, bidirectional=True)
    ways = build(name), build(name)
    for way, ending in zip(ways, ("l0", "l0_reverse"), strict=True):
        own = {key.replace("l0", ending): key for key in way.state_dict()}
        way.load_state_dict({own[k]: v for k, v in both.state_dict().items() if k in own})
    x, hx = given(), initial(both, BATCH)
    output, state = both(x, hx)
    halves = [part.chunk(2) for part in states_of(hx)]
    first, second = (
        way(turned, half if carries_cell(both) else half[0])
        for way, turned, half in zip(ways, (x, x.flip(0)), zip(*halves, strict=True), strict=True)
    )
    close(output, torch.cat((first[0], second[0].flip(0)), -1))
    for mine, one, other in zip(*map(states_of, (state, first[1], second[1])), strict=True):
        close(mine, torch.cat((one, other)))


@every_cell
def test_two_layers_are_one_after_the_other(name: str) -> None:
    deep = build(name, num_layers=2)
    first, second = build(name), CELLS[name](HIDDEN, HIDDEN, dtype=F64).eval()
    for layer, module in enumerate((first, second)):
        own = {key.replace("l0", f"l{layer}"): key for key in module.state_dict()}
        module.load_state_dict({own[k]: v for k, v in deep.state_dict().items() if k in own})
    x = given()
    output, state = deep(x)
    middle, below = first(x)
    top, above = second(middle)
    close(output, top)
    for mine, one, other in zip(*map(states_of, (state, below, above)), strict=True):
        close(mine, torch.cat((one, other)))


@every_cell
def test_layouts_are_one_network(name: str) -> None:
    module, x = build(name, **DEEP), given()
    output, state = module(x)
    assert output.shape == (STEPS, BATCH, 2 * HIDDEN)
    assert all(part.shape == (4, BATCH, HIDDEN) for part in states_of(state))
    alone, last = module(x[:, 1])
    close((alone, last), (output[:, 1], of_sequence(state, 1)))
    first = build(name, batch_first=True, **DEEP)
    first.load_state_dict(module.state_dict())
    turned, also = first(x.transpose(0, 1))
    close((turned.transpose(0, 1), also), (output, state))
    close(first(x[:, 1])[0], output[:, 1])


@every_cell
def test_no_state_given_is_a_zero_state(name: str) -> None:
    module, x = build(name, **DEEP), given()
    hx = initial(module, BATCH)
    zeros = tuple(torch.zeros_like(part) for part in states_of(hx))
    close(module(x), module(x, zeros if carries_cell(module) else zeros[0]))
    assert not torch.equal(module(x)[0], module(x, hx)[0])


@every_cell
@pytest.mark.parametrize("bias", [True, False])
def test_every_parameter_is_used(name: str, bias: bool) -> None:
    """A parameter without a gradient would stop distributed training."""
    module = build(name, bias=bias, **DEEP)
    total = sum(part.square().sum() for part in flat(module(given(), initial(module, BATCH))))
    total.backward()
    for key, parameter in module.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.any()), key
    assert all("bias_ih" not in key for key in module.state_dict()) != bias


@every_cell
def test_dropout_lies_between_the_layers_in_training_only(name: str) -> None:
    module, x = build(name, num_layers=2, dropout=1.0), given()
    calm = build(name, num_layers=2)
    calm.load_state_dict(module.state_dict())
    close(module(x), calm(x))
    for child in module.children():  # zoneout draws at random in training
        vars(child).update({"hidden": 0.0, "cell": 0.0} if "zoneout" in name else {})
    module.train()
    second = module(x)[0]
    close(second, module(torch.randn_like(x))[0])  # nothing of the input comes through
    assert bool(module(x)[1][0].any())


@every_cell
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeps_the_dtype(name: str, dtype: torch.dtype) -> None:
    exact = build(name, **DEEP).to(dtype).double()
    module = build(name, **DEEP).to(dtype)
    module.load_state_dict(exact.state_dict())
    x = given().to(dtype)
    found = flat(module(x))
    assert {part.dtype for part in found} == {dtype}
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for part, other in zip(found, flat(exact(x.double())), strict=True):
        torch.testing.assert_close(part.double(), other, rtol=0, atol=tolerance)


@every_cell
def test_under_autocast(name: str) -> None:
    module = build(name, dtype=torch.float32, **DEEP)
    x = torch.randn(STEPS, BATCH, IN)
    exact = module(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = module(x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), exact, rtol=0, atol=0.05)
    output.float().square().sum().backward()
    gradients = [parameter.grad for parameter in module.parameters()]
    assert all(g is not None and g.dtype == torch.float32 for g in gradients)


@every_cell
def test_wrong_calls_are_refused_as_torch_refuses_them(name: str) -> None:
    module = build(name, num_layers=2)
    plain = plain_of(module)(IN, HIDDEN, num_layers=2, dtype=F64)
    hx = initial(module, BATCH)
    narrow = tuple(part[..., :-1] for part in states_of(hx))
    few = tuple(part[:1] for part in states_of(hx))
    _, packed = ragged()
    wrong_width = packed._replace(data=packed.data[:, :-1])
    calls: list[tuple[Any, ...]] = [
        (given(STEPS),),
        (given(1, 1, 1, IN),),
        (given(STEPS, BATCH, IN + 1),),
        (given().float(),),
        (given(0, BATCH, IN),),
        (given(), narrow if carries_cell(module) else narrow[0]),
        (given(), few if carries_cell(module) else few[0]),
        (given(STEPS, IN), hx),
        (given(), of_sequence(hx, 0)),
        (wrong_width,),
    ]
    for call in calls:
        errors = []
        for tried in (plain, module):
            with pytest.raises((ValueError, RuntimeError)) as caught:
                tried(*call)
            errors.append(caught.type)
        assert errors[0] is errors[1], call


@every_cell
def test_sizes_are_torchs_to_check(name: str) -> None:
    with pytest.raises(ValueError, match="hidden_size"):
        CELLS[name](IN, 0)
    with pytest.raises(TypeError):
        CELLS[name](IN, HIDDEN, no_such_option=1)
    if not name.endswith("lstm"):
        with pytest.raises(ValueError, match="proj_size"):
            CELLS[name](IN, HIDDEN, proj_size=2)


@every_cell
def test_functional_call_uses_the_given_weights(name: str) -> None:
    module, other, x = build(name, **DEEP), build(name, **DEEP), given()
    before = module(x)
    close(functional_call(module, dict(other.named_parameters()), (x,)), other(x))
    close(module(x), before)
    # In another dtype too, which torch's own check of a stale list would refuse.
    single = {key: value.float() for key, value in other.named_parameters()}
    assert functional_call(module, single, (x.float(),))[0].dtype == torch.float32


@every_cell
def test_gradients_of_each_sample(name: str) -> None:
    module, x = build(name), given(3, 3, 1, IN)
    held = dict(module.named_parameters())

    def loss(weights: dict[str, Tensor], one: Tensor) -> Tensor:
        total: Tensor = functional_call(module, weights, (one,))[0].square().sum()
        return total

    found = vmap(grad(loss), (None, 0))(held, x)
    for index, one in enumerate(x):
        alone = torch.autograd.grad(loss(held, one), list(held.values()))
        close([value[index] for value in found.values()], alone)


@every_cell
def test_second_derivatives(name: str) -> None:
    module = build(name)
    x = given(3, 2, IN).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda now: module(now)[0], (x,))


@every_cell
def test_copies_and_pickles(name: str) -> None:
    module, x = build(name, **DEEP), given()
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    copies = [
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(file, weights_only=False),
    ]
    for made in copies:
        assert type(made) is type(module)
        close(made(x), module(x))
        drawn(made)  # its own weights, not the first one's
        assert not torch.equal(made(x)[0], module(x)[0])
    assert repr(copies[1]) == repr(module)


@every_cell
def test_a_checkpoint_of_weights_only(name: str) -> None:
    module, other, x = build(name, **DEEP), build(name, **DEEP), given()
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    close(other(x), module(x))


@every_cell
def test_a_plain_checkpoint_keeps_its_keys(name: str) -> None:
    module = build(name, **DEEP)
    plain = plain_of(module)(IN, HIDDEN, dtype=F64, **DEEP)
    own = list(plain.state_dict())
    assert list(module.state_dict())[: len(own)] == own
    if name in WITHOUT_KEYS:
        module.load_state_dict(plain.state_dict())
    else:
        older = pytest.warns(RNNGuardWarning, match="from before the rewrite")
        with older, pytest.raises(RuntimeError, match="Missing key"):
            module.load_state_dict(plain.state_dict())
        with older:
            module.load_state_dict(plain.state_dict(), strict=False)
    assert all(torch.equal(module.state_dict()[key], plain.state_dict()[key]) for key in own)
    assert (set(module.state_dict()) == set(own)) == (name in WITHOUT_KEYS)


@with_keys
def test_a_checkpoint_of_its_own_loads_without_a_word(name: str) -> None:
    holder = nn.ModuleList([build(name)])
    holder.load_state_dict(nn.ModuleList([build(name)]).state_dict())


@every_cell
def test_can_be_exported(name: str) -> None:
    module, x = build(name, batch_first=True, bidirectional=True), given(BATCH, 3, IN)
    program = torch.export.export(module, (x,))
    close(program.module()(x), module(x))
    assert set(program.state_dict) == set(module.state_dict())


@every_cell
# torch.compile, about what it goes on with after each recurrence of torch as well.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_in_a_compiled_model_it_stays_eager_and_fast(name: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before, self.cell = nn.Linear(IN, IN, dtype=F64), build(name)

        def forward(self, x: Tensor) -> Tensor:
            before = self.before(x).relu()
            output: Tensor = self.cell(before)[0]
            return output

    seen: list[str] = []

    def backend(graph: fx.GraphModule, _: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op.startswith("call"))
        return graph.forward

    torch.compiler.reset()
    model, x = Net(), given()
    compiled = torch.compile(model, backend=backend)(x)
    assert len(seen) == 2, seen  # the linear layer and the relu before it
    assert "_Fast" in compiled.grad_fn.name()  # which rung ran shows in the graph
    close(compiled, model(x))


@every_cell
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_torchscript_is_refused_in_a_sentence(name: str) -> None:
    with pytest.raises(RefusedError, match=r"torch\.export") as caught:
        torch.jit.script(build(name))
    assert caught.value.code == "RG923"


@every_cell
def test_reset_parameters_starts_anew(name: str) -> None:
    """Torch's own would draw the gains of a norm like weights."""
    torch.manual_seed(5)
    new = CELLS[name](IN, HIDDEN, **DEEP)
    module = build(name, dtype=torch.float32, **DEEP)
    torch.manual_seed(5)
    module.reset_parameters()
    assert all(parameter.abs().max() <= 0.6 for parameter in module.parameters(recurse=False)) or (
        name == "indrnn"
    )
    for key, parameter in new.named_parameters():
        if "." in key and "gate_" not in key:
            assert torch.equal(parameter, module.get_parameter(key)), key


@every_cell
def test_a_morph_needs_its_class_and_children_only(name: str) -> None:
    module = build(name, **DEEP)
    plain = plain_of(module)(IN, HIDDEN, dtype=F64, **DEEP).eval()
    if plain_of(module) is nn.RNN:
        plain.nonlinearity = module.nonlinearity
    plain.load_state_dict({k: v for k, v in module.state_dict().items() if "." not in k})
    held = list(plain.parameters())
    plain.__class__ = type(module)
    for child, value in module.named_children():
        plain.add_module(child, value)
    x = given()
    close(plain(x), module(x))
    assert all(any(p is own for own in plain.parameters()) for p in held)


@every_cell
def test_takes_no_memory_of_the_run_without_gradients(name: str) -> None:
    module = build(name)
    with torch.no_grad():
        assert not module(given())[0].requires_grad
    with torch.inference_mode():
        assert module(given())[0].is_inference()


def test_a_cell_says_how_a_lane_runs() -> None:
    with pytest.raises(NotImplementedError):
        Stack("LSTM", IN, HIDDEN).lane(None)  # type: ignore[arg-type]
