"""Which weights count as untouched initialisation, and that the least training is noticed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, Adam, Optimizer

import rnnguard
from rnnguard.inspection.gates import GATES, cell_of, recurrences, weights_of
from rnnguard.inspection.neighbours import parts_of
from rnnguard.inspection.provenance import (
    is_orthogonal_across_gates,
    provenance_of,
    provenance_of_written,
)
from rnnguard.remedies.chrono_bias import CHRONO_BIAS
from rnnguard.remedies.critical_gain import CRITICAL_GAIN
from rnnguard.remedies.orthogonal import ORTHOGONAL
from rnnguard.remedies.recurrent_gain import RECURRENT_GAIN
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
        count += not provenance_of(make()).trained
    return count


@every_kind
@pytest.mark.parametrize("hidden", [4, 8, 32, 128])
def test_torchs_default_is_accepted(kind: str, hidden: int) -> None:
    assert accepted(lambda: KINDS[kind](5, hidden), range(15)) == 15


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
        lambda: nn.GRU(5, 32).double(),
        lambda: nn.LSTM(5, 32).to(torch.bfloat16),
        lambda: nn.LSTM(5, 32).half(),
        # 1/sqrt(512) lies between two numbers of bfloat16, and so does the largest weight.
        lambda: nn.RNN(3, 512).to(torch.bfloat16),
        lambda: nn.utils.parametrizations.weight_norm(nn.LSTM(5, 32), "weight_hh_l0"),
    ],
)
def test_the_default_in_other_shapes_is_accepted(make: Callable[[], nn.Module]) -> None:
    """Half precision may be vetoed once in two hundred."""
    assert accepted(make, range(6)) == 6


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
    assert accepted(lambda: init(kind), range(8)) == 8


@torch.no_grad()
def with_forget_bias() -> nn.LSTM:
    module = nn.LSTM(5, 8)
    module.get_parameter("bias_ih_l0")[8:16] = 1.0
    return module


@torch.no_grad()
def within_round_bounds() -> nn.LSTM:
    module = nn.LSTM(5, 8)
    for parameter in module.parameters():
        parameter.uniform_(-0.08, 0.08)
    return module


@torch.no_grad()
def scaled_matrix() -> nn.LSTM:
    module = nn.LSTM(5, 8)
    module.get_parameter("weight_hh_l0").mul_(1.3)
    return module


@pytest.mark.parametrize("make", [with_forget_bias, within_round_bounds, scaled_matrix])
def test_a_default_changed_by_hand_is_accepted(make: Callable[[], nn.Module]) -> None:
    assert accepted(make, range(8)) == 8


@torch.no_grad()
def identity_rnn() -> nn.RNN:
    module = nn.RNN(5, 32, nonlinearity="relu")
    without_bias(module)
    nn.init.eye_(module.get_parameter("weight_hh_l0"))
    nn.init.normal_(module.get_parameter("weight_ih_l0"), 0, 0.1)
    return module


def test_an_identity_recurrence_is_accepted() -> None:
    assert accepted(identity_rnn, range(10)) == 10


@pytest.mark.parametrize(
    ("kind", "cure"),
    [
        ("lstm", CHRONO_BIAS),
        ("gru", CHRONO_BIAS),
        *(
            (kind, cure)
            for kind in KINDS
            for cure in (ORTHOGONAL, VARIANCE_SCALING, CRITICAL_GAIN, RECURRENT_GAIN)
        ),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_our_own_values_are_accepted(kind: str, cure: Remedy) -> None:
    """Else a second call would take the first one's work for training."""

    def make() -> nn.Module:
        module = KINDS[kind](5, 32)
        seed = int(torch.randint(1000, ()))
        dose = {"t_max": 100, "seed": seed, "input_rms": 1.0, "factor": 1.2, "target": 0.4}
        cure.apply(Edit(module, None), module, dose)
        return module

    assert accepted(make, range(8)) == 8


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
@pytest.mark.parametrize("hidden", [4, 8, 64])
def test_a_single_step_is_noticed(kind: str, optimizer: str, hidden: int) -> None:
    assert accepted(lambda: trained(kind, hidden, OPTIMIZERS[optimizer], 1), range(4)) == 0


@pytest.mark.parametrize("prepare", [like_keras, gate_by_gate, "our own"])
def test_a_single_step_from_other_starts_is_noticed(prepare: Any) -> None:
    def make() -> nn.Module:
        module = nn.LSTM(5, 8) if prepare == "our own" else prepare("lstm")
        if prepare == "our own":
            for cure in (ORTHOGONAL, CHRONO_BIAS):
                cure.apply(Edit(module, None), module, {"t_max": 100, "seed": 0})
        SGD(module.parameters(), lr=1e-3).zero_grad()
        module(torch.randn(4, 16, 5))[0][-1].square().mean().backward()
        SGD(module.parameters(), lr=1e-3).step()
        return module

    assert accepted(make, range(5)) == 0


def test_training_in_half_precision_is_noticed_later() -> None:
    make = lambda: trained("lstm", 32, OPTIMIZERS["adam"], 100).to(torch.bfloat16)  # noqa: E731
    assert accepted(make, range(3)) == 0


def test_few_values_in_half_precision_are_unsure() -> None:
    found = provenance_of(nn.RNN(5, 8).to(torch.bfloat16))
    assert found.verdict == "unsure" and "too few" in found.reason


def test_half_precision_training_behind_single_precision_storage_shows_no_false_mark() -> None:
    """Coarse values fit the generator's grid where its bound is a power of two."""
    module = trained("gru", 64, OPTIMIZERS["adam"], 100)
    assert provenance_of(module.to(torch.bfloat16).float()).trained


def test_a_trained_norm_behind_counts_in_half_precision() -> None:
    torch.manual_seed(0)
    module, norm = nn.LSTM(5, 32).to(torch.bfloat16), nn.LayerNorm(32)
    assert provenance_of(module, [norm]).verdict == "untrained"
    with torch.no_grad():
        norm.weight[3] = 1.01
    assert provenance_of(module, [norm]).verdict == "unsure"


def test_too_few_values_are_unsure() -> None:
    assert provenance_of(nn.RNN(1, 1)).verdict == "unsure"


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
    assert not provenance_of(module).trained
    with torch.no_grad():
        module.get_parameter("weight_hh_l1").add_(0.1 * torch.rand(128, 32))
    assert provenance_of(module).trained
    with torch.no_grad():
        module.get_parameter("bias_hh_l1").add_(0.3 * torch.randn(128))
    found = provenance_of(module)
    assert found.verdict == "trained" and "bias_hh_l1" in found.reason


def test_a_checkpoint_mapped_from_a_file_is_trained(tmp_path: Path) -> None:
    file, module = tmp_path / "best.pt", nn.LSTM(5, 8)
    torch.save(module.state_dict(), file)
    loaded = nn.LSTM(5, 8)
    loaded.load_state_dict(torch.load(file, mmap=True), assign=True)
    assert provenance_of(loaded).verdict == "trained"
    assert "best.pt" in provenance_of(loaded).reason
    assert provenance_of(module).verdict == "untrained"


class BehindPretrained(nn.Module):
    """A new LSTM behind a front end that was trained elsewhere, frozen or not."""

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 16)
        self.convolution = nn.Conv1d(16, 8, 3, padding=1)
        self.norm = nn.BatchNorm1d(8)
        front = [self.embedding, self.convolution, self.norm]
        with torch.no_grad():
            for parameter in nn.ModuleList(front).parameters():
                parameter.add_(torch.randn_like(parameter))
        self.norm.num_batches_tracked.fill_(9000)
        nn.ModuleList(front).requires_grad_(not frozen)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.norm(self.convolution(self.embedding(x).mT)).mT
        out: Tensor = self.head(self.lstm(seen)[0][:, -1])
        return out


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_recurrence_behind_a_pretrained_front_end_is_untrained(
    frozen: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    model = BehindPretrained(frozen).to(dtype)
    optimizer = SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    report = rnnguard.audit(model, optimizer, inputs=torch.randint(9, (4, 12)), memory=12)
    found = report["lstm"].provenance
    assert found is not None and found.verdict == "untrained", found


class Written(nn.Module):
    """A cell by hand; `wide` has input and state side by side in one matrix."""

    def __init__(self, wide: bool) -> None:
        super().__init__()
        self.wide = wide
        self.x2h = nn.Linear(5, 16)
        self.h2h = nn.Linear(21 if wide else 16, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 16)
        for step in x.unbind(1):
            z = torch.cat([step, h], 1) if self.wide else h
            h = torch.tanh(self.x2h(step) + self.h2h(z))
        return h


@pytest.mark.parametrize("wide", [True, False])
def test_a_hand_written_recurrence_is_judged_alike(wide: bool) -> None:
    torch.manual_seed(0)
    model = Written(wide)
    x = torch.randn(4, 12, 5)
    optimizer = SGD(model.parameters(), lr=0.01)
    (fresh,) = rnnguard.audit(model, optimizer, inputs=x, memory=12).before.sites
    assert fresh.provenance is not None and fresh.provenance.verdict == "untrained"
    model(x).square().sum().backward()
    optimizer.step()
    (moved,) = rnnguard.audit(model, SGD(model.parameters(), 0.1), inputs=x, memory=12).before.sites
    assert moved.trained and moved.provenance is not None and "h2h" in moved.provenance.reason


def test_gate_biases_set_on_purpose_leave_a_hand_written_cell_untrained() -> None:
    torch.manual_seed(0)
    cell = nn.ModuleDict({"x2h": nn.Linear(5, 32), "h2h": nn.Linear(16, 32)})
    with torch.no_grad():
        cell["x2h"].bias[:16] = torch.rand(16).log()
    spans = [("x2h.bias", 0, 0, 16)]
    named = dict(cell.named_parameters())
    parts = parts_of(["h2h.weight"], spans, named)
    assert provenance_of_written(parts).verdict == "untrained"
    assert provenance_of_written(parts_of(["h2h.weight", "x2h.bias"], [], named)).trained


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
