"""Which weights count as untouched initialisation, with the measured rates of both errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adam, Optimizer

from rnnguard.inspection.gates import GATES, cell_of, recurrences, weights_of
from rnnguard.inspection.provenance import is_orthogonal_across_gates, looks_untrained
from rnnguard.remedies.chrono_bias import CHRONO_BIAS
from rnnguard.remedies.orthogonal import ORTHOGONAL
from rnnguard.remedies.remedy import Remedy
from rnnguard.remedies.variance_scaling import VARIANCE_SCALING
from rnnguard.rewrite.edit import Edit

KINDS: dict[str, type[nn.RNNBase]] = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
every_kind = pytest.mark.parametrize("kind", KINDS)


def accepted(make: Callable[[], nn.Module], seeds: range) -> int:
    """How many of the seeds give a module that passes as untrained."""
    count = 0
    for seed in seeds:
        torch.manual_seed(seed)
        count += looks_untrained(make())
    return count


@every_kind
@pytest.mark.parametrize("hidden", [8, 32, 128])
def test_torchs_default_is_accepted(kind: str, hidden: int) -> None:
    """Measured: 1 of 360 is vetoed, which costs that model its value remedies."""
    assert accepted(lambda: KINDS[kind](5, hidden), range(40)) >= 39


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.LSTM(5, 32, num_layers=3, bidirectional=True),
        lambda: nn.LSTM(5, 32, proj_size=8),
        lambda: nn.GRU(5, 32, bias=False),
        lambda: nn.LSTM(1, 32),
        lambda: nn.RNN(300, 64),
        lambda: nn.LSTMCell(5, 32),
        lambda: nn.GRUCell(5, 32, bias=False),
        lambda: nn.GRU(5, 32, dtype=torch.float64),
    ],
)
def test_the_default_in_other_shapes_is_accepted(make: Callable[[], nn.Module]) -> None:
    """Each tensor is tested at 1e-3, so a module of 24 tensors is vetoed once in 40."""
    assert accepted(make, range(10)) >= 9


def tensors(module: nn.RNNBase) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Input matrices and recurrent matrices gate by gate, for each layer and direction."""
    cell = cell_of(module)
    assert cell is not None
    blocks = len(GATES[cell].blocks)
    for layer, direction in recurrences(module):
        weights = weights_of(module, layer, direction)
        yield list(weights.ih.chunk(blocks)), list(weights.hh.chunk(blocks))


@torch.no_grad()
def without_bias(module: nn.RNNBase) -> nn.RNNBase:
    for name, parameter in module.named_parameters():
        if "bias" in name:
            parameter.zero_()
    return module


@torch.no_grad()
def like_keras(kind: str) -> nn.RNNBase:
    """Xavier and orthogonal on the whole stack, zero biases, forget bias one."""
    module = without_bias(KINDS[kind](5, 32))
    for name, parameter in module.named_parameters():
        if "weight_ih" in name:
            nn.init.xavier_uniform_(parameter)
        elif "weight_hh" in name:
            nn.init.orthogonal_(parameter)
        elif kind == "lstm" and "bias_ih" in name:
            parameter[32:64] = 1.0
    return module


@torch.no_grad()
def gate_by_gate(kind: str) -> nn.RNNBase:
    module = without_bias(KINDS[kind](5, 32))
    for ih, hh in tensors(module):
        for block in ih:
            nn.init.xavier_uniform_(block)
        for block in hh:
            nn.init.orthogonal_(block)
    return module


@torch.no_grad()
def gaussian(kind: str) -> nn.RNNBase:
    module = without_bias(KINDS[kind](5, 32))
    for name, parameter in module.named_parameters():
        if "weight" in name:
            parameter.normal_(0, 1 / math.sqrt(32))
    return module


@every_kind
@pytest.mark.parametrize("init", [like_keras, gate_by_gate, gaussian])
def test_common_recipes_are_accepted(kind: str, init: Callable[[str], nn.RNNBase]) -> None:
    """The Gaussian one is tested at 1e-2 for each of two matrices."""
    assert accepted(lambda: init(kind), range(20)) >= 18


@torch.no_grad()
def identity_rnn() -> nn.RNN:
    module = nn.RNN(5, 32, nonlinearity="relu")
    without_bias(module)
    nn.init.eye_(module.get_parameter("weight_hh_l0"))
    nn.init.normal_(module.get_parameter("weight_ih_l0"), 0, 0.1)
    return module


def test_an_identity_recurrence_is_accepted() -> None:
    assert accepted(identity_rnn, range(10)) >= 9


@pytest.mark.parametrize(
    ("kind", "cure"),
    [
        ("lstm", CHRONO_BIAS),
        ("gru", CHRONO_BIAS),
        *((kind, cure) for kind in KINDS for cure in (ORTHOGONAL, VARIANCE_SCALING)),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_our_own_values_are_accepted(kind: str, cure: Remedy) -> None:
    """Else a second call would take the first one's work for training."""

    def make() -> nn.Module:
        module = KINDS[kind](5, 32)
        seed = int(torch.randint(1000, ()))
        cure.apply(Edit(module, None), module, {"t_max": 100, "seed": seed, "input_rms": 1.0})
        return module

    assert accepted(make, range(20)) >= 19


def trained(kind: str, hidden: int, build: Callable[..., Optimizer], steps: int) -> nn.Module:
    """A classifier's recurrence after some steps on one batch."""
    module, head = KINDS[kind](5, hidden), nn.Linear(hidden, 2)
    optimizer = build([*module.parameters(), *head.parameters()])
    x, y = torch.randn(4, 16, 5), torch.randint(2, (16,))
    for _ in range(steps):
        optimizer.zero_grad()
        functional.cross_entropy(head(module(x)[0][-1]), y).backward()
        optimizer.step()
    return module


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": lambda parameters: SGD(parameters, lr=0.1),
    "adam": lambda parameters: Adam(parameters, lr=1e-3),
}


@every_kind
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("steps", [20, 100])
def test_training_is_noticed(kind: str, optimizer: str, steps: int) -> None:
    """Measured at 32 units: none of 120 modules passes as untrained."""
    assert accepted(lambda: trained(kind, 32, OPTIMIZERS[optimizer], steps), range(4)) == 0


def test_training_of_few_units_is_noticed_late() -> None:
    """At 8 units the tests have little to go by: gates help, and 100 steps of Adam suffice."""
    assert accepted(lambda: trained("lstm", 8, OPTIMIZERS["adam"], 100), range(5)) == 0


@pytest.mark.parametrize("steps", [20, 100])
def test_training_on_our_values_is_noticed(steps: int) -> None:
    def make() -> nn.Module:
        module, head = nn.LSTM(5, 32), nn.Linear(32, 2)
        CHRONO_BIAS.apply(Edit(module, None), module, {"t_max": 100, "seed": 0})
        optimizer = Adam([*module.parameters(), *head.parameters()])
        x, y = torch.randn(4, 16, 5), torch.randint(2, (16,))
        for _ in range(steps):
            optimizer.zero_grad()
            functional.cross_entropy(head(module(x)[0][-1]), y).backward()
            optimizer.step()
        return module

    assert accepted(make, range(3)) == 0


def test_training_from_a_gaussian_start_is_noticed_by_its_biases() -> None:
    def make() -> nn.Module:
        module = gaussian("lstm")
        optimizer = Adam(module.parameters())
        for _ in range(20):
            optimizer.zero_grad()
            module(torch.randn(4, 16, 5))[0][-1].square().sum().backward()
            optimizer.step()
        return module

    assert accepted(make, range(3)) == 0


@torch.no_grad()
def chrono_with_a_stray_block(kind: str) -> nn.RNNBase:
    """Keep and write bias as chrono leaves them, one other block as it never does."""
    module = KINDS[kind](5, 32)
    CHRONO_BIAS.apply(Edit(module, None), module, {"t_max": 100, "seed": 0})
    module.get_parameter("bias_ih_l0")[-32:].normal_()
    return module


def gaussian_without_biases(kind: str) -> nn.RNNBase:
    module = KINDS[kind](5, 32, bias=False)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 1 / math.sqrt(32))
    return module


@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize("make", [chrono_with_a_stray_block, gaussian_without_biases])
def test_what_is_unsure_counts_as_trained(kind: str, make: Callable[[str], nn.RNNBase]) -> None:
    assert accepted(lambda: make(kind), range(3)) == 0


def test_one_trained_layer_is_enough() -> None:
    module = nn.LSTM(5, 32, num_layers=2)
    assert looks_untrained(module)
    with torch.no_grad():
        module.get_parameter("weight_hh_l1").mul_(1.5)
    assert not looks_untrained(module)


def test_orthogonal_across_gates() -> None:
    whole, single, fresh = nn.LSTM(3, 8), nn.LSTM(3, 8), nn.LSTM(3, 8)
    with torch.no_grad():
        nn.init.orthogonal_(whole.get_parameter("weight_hh_l0"))
        for block in single.get_parameter("weight_hh_l0").chunk(4):
            nn.init.orthogonal_(block)
    verdicts = [
        is_orthogonal_across_gates(weights_of(module, 0, "forward"), 4)
        for module in (whole, single, fresh)
    ]
    assert verdicts == [True, False, False]
    plain = nn.RNN(3, 8)
    nn.init.orthogonal_(plain.get_parameter("weight_hh_l0"))
    assert not is_orthogonal_across_gates(weights_of(plain, 0, "forward"), 1)
