"""Every refusal in its own words, and all reasons at once."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm
from torch.optim import SGD, Adam

from rnnguard.errors import Refusal, RefusedError, refuse
from rnnguard.inspection.preflight import (
    optimizer_refusals,
    rewrite_refusals,
    run_refusals,
    skip_refusals,
    tier_refusals,
)

imports_old_torch = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 3), nn.LSTM(3, 4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x)[0][-1])


def said(reasons: Iterator[Refusal] | list[Refusal]) -> list[str]:
    return [str(reason) for reason in reasons]


def test_nothing_to_refuse() -> None:
    model = Net()
    assert said(run_refusals(model)) == []
    assert said(rewrite_refusals(model, SGD(model.parameters()), ())) == []
    assert said(skip_refusals(model, ["encoder.1", "head"])) == []
    assert said(tier_refusals(["step", "values", "structure"])) == []
    refuse([])


@imports_old_torch
def test_scripted() -> None:
    model = Net()
    model.head = torch.jit.script(nn.Linear(4, 2))
    assert said(run_refusals(model)) == [
        "`head`: the module is scripted. "
        "Call rnnguard on the plain model, before torch.jit.script. (RG908)"
    ]


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_lazy() -> None:
    model = Net()
    model.head = nn.LazyLinear(2)
    assert said(run_refusals(model)) == [
        "`head.weight`: the parameter is lazy and has no values yet (1 more like it). "
        "Run the model once on a batch first. (RG907)"
    ]


def test_meta() -> None:
    model = Net()
    model.head = nn.Linear(4, 2, bias=False, device="meta")
    assert said(run_refusals(model)) == [
        "`head.weight`: the parameter lies on the meta device. "
        "Move the model to a device with `to_empty` and initialise it first. (RG907)"
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights(value: float) -> None:
    model = Net()
    with torch.no_grad():
        model.head.weight[0, 0] = value
    assert said(run_refusals(model)) == [
        "`head.weight`: the weights hold NaN or infinity. "
        "Build the model again, or load a checkpoint from before the bad step. (RG911)"
    ]


def test_foreign_parameters() -> None:
    model, other = Net(), Net()
    optimizer = SGD([*model.parameters(), *other.head.parameters()], lr=0.1)
    assert said(optimizer_refusals(model, optimizer)) == [
        "`optimizer`: holds 2 of 10 parameters that are not this model's: (2, 4), (2,). "
        "Build it from this model's parameters, or pass one module that holds them all. (RG904)"
    ]


def test_many_foreign_parameters_are_cut_short() -> None:
    (reason,) = optimizer_refusals(Net(), Adam(Net().parameters()))
    assert reason.fact == (
        "holds 8 of 8 parameters that are not this model's: (3, 3), (3,), (16, 3) and more."
    )


def test_no_optimizer_at_all() -> None:
    wrong: Any = torch.optim.lr_scheduler.StepLR(SGD(Net().parameters()), 1)
    assert said(optimizer_refusals(Net(), wrong)) == [
        "`optimizer`: a StepLR is not a torch.optim.Optimizer. "
        "Pass the optimizer object itself. (RG904)"
    ]


def test_an_optimizer_of_copies() -> None:
    """What it steps are not the weights that it names, as in old mixed precision."""
    model = Net()
    masters = SGD([p.detach().clone().requires_grad_() for p in model.parameters()])
    optimizer = SGD(model.parameters())
    optimizer.inner = masters  # type: ignore[attr-defined]
    assert said(optimizer_refusals(model, optimizer)) == [
        "`optimizer`: its inner SGD steps copies of the weights and not the weights themselves. "
        "Clip with what made the copies. (RG904)"
    ]


PARAMETRIZED = (
    "`encoder.1`: weight_hh_l0 is parametrized. Remove the parametrization "
    'or leave this site out with `skip=["encoder.1"]`. (RG903)'
)


def test_parametrized() -> None:
    model = Net()
    parametrizations.spectral_norm(model.encoder[1], "weight_hh_l0")
    assert said(rewrite_refusals(model, SGD(model.parameters()), ())) == [PARAMETRIZED]
    assert said(rewrite_refusals(model, SGD(model.parameters()), ["encoder.1"])) == []


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_weight_norm_of_the_old_style() -> None:
    model = Net()
    weight_norm(model.encoder[1], "weight_hh_l0")
    assert said(rewrite_refusals(model, SGD(model.parameters()), ())) == [PARAMETRIZED]


def test_weight_drop() -> None:
    """It keeps the weight as a parameter of another name and sets it anew each forward."""
    model = Net()
    lstm = model.encoder[1]
    raw = lstm._parameters.pop("weight_hh_l0")
    lstm.register_parameter("weight_hh_l0_raw", raw)
    assert said(rewrite_refusals(model, SGD(model.parameters()), ())) == [PARAMETRIZED]


def test_a_parametrized_head_is_none_of_our_business() -> None:
    model = Net()
    parametrizations.weight_norm(model.head)
    assert said(rewrite_refusals(model, SGD(model.parameters()), ())) == []


def test_an_unknown_path() -> None:
    assert said(skip_refusals(Net(), ["encoder.l"])) == [
        "`skip`: `skip` names 'encoder.l', which is no module of this model; "
        "did you mean 'encoder.1'? (RG914)"
    ]


def test_an_unknown_path_in_a_model_without_recurrences() -> None:
    (reason,) = skip_refusals(nn.Sequential(nn.Linear(1, 1)), ["lstm"])
    assert reason.cure == "known: '', '0'."


def test_an_unknown_tier() -> None:
    assert said(tier_refusals(["step", "value"])) == [
        "`tiers`: 'value' is not a tier; did you mean 'values'? (RG914)"
    ]


def test_all_reasons_at_once() -> None:
    model = Net()
    parametrizations.spectral_norm(model.encoder[1], "weight_hh_l0")
    with torch.no_grad():
        model.head.bias.fill_(float("nan"))
    optimizer = SGD(copy.deepcopy(model).parameters())
    with pytest.raises(RefusedError) as caught:
        refuse(
            [
                *run_refusals(model),
                *tier_refusals(["all"]),
                *rewrite_refusals(model, optimizer, ()),
            ]
        )
    error = caught.value
    assert [reason.code for reason in error.reasons] == ["RG911", "RG914", "RG903", "RG904"]
    assert str(error).splitlines() == said(list(error.reasons))
    assert (error.code, error.path) == ("RG911", "head.bias")


def test_one_weight_under_two_names_is_no_parametrization() -> None:
    model = nn.RNN(4, 4)
    model.weight_hh_l0 = model.weight_ih_l0
    assert list(rewrite_refusals(model, SGD(model.parameters()), ())) == []


def test_a_sparse_parameter_is_looked_into() -> None:
    model = nn.RNN(4, 4)
    model.table = nn.Parameter(torch.eye(3).to_sparse(), requires_grad=False)
    assert list(run_refusals(model)) == []
    model.table = nn.Parameter(torch.tensor([[0.0, float("inf")]]).to_sparse(), False)
    assert [reason.path for reason in run_refusals(model)] == ["table"]
