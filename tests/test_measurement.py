"""The whole measurement: sites and run together, made-up batches, and what cannot run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from factories import subject
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import StepLR

from rnnguard.errors import RefusedError
from rnnguard.probe.measurement import Look, measure, optimizer_kind
from rnnguard.probe.subject import Subject, check_runs, guessed_batches

F, H, T, B = 3, 4, 6, 5


class Net(nn.Module):
    def __init__(self, batch_first: bool = False) -> None:
        super().__init__()
        self.lstm = nn.LSTM(F, H, batch_first=batch_first)
        self.head = nn.Linear(H, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[1][0][-1])


X = torch.randn(T, B, F, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 0, 1, 1])


def look(
    model: nn.Module | None = None, optimizer: Optimizer | None = None, **options: Any
) -> Look:
    given = {"data": [(X, Y)] * 2, "loss": nn.CrossEntropyLoss()} | options
    return measure(subject(model or Net(), given.pop("data"), optimizer, **given))


def test_sites_and_run() -> None:
    model = Net()
    found = look(model)
    (site,) = found.measurement.sites
    assert (site.path, site.cell, site.steps, site.batch) == ("lstm", "lstm", T, B)
    assert (site.memory_needed, site.memory_source) == (5, "declared")
    run = found.measurement.run
    assert (run.basis, run.batches, run.precision, run.device) == ("real data", 2, "fp32", "cpu")
    assert (run.optimizer, run.learning_rate, run.nonfinite) == ("none", None, False)
    assert run.seconds > 0 and run.torch == torch.__version__
    assert found.signature == ((2, 2, torch.float32),)
    assert found.unregistered == ()


def test_the_gradient_is_that_of_the_loss() -> None:
    model = Net()
    run = look(model).measurement.run
    loss = nn.CrossEntropyLoss()(model(X), Y)
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert run.loss == pytest.approx(float(loss.detach()))
    assert run.grad_norm == pytest.approx(float(norm), rel=1e-5)
    assert run.grad_norm_spread == pytest.approx(1.0)


def test_without_a_loss_there_is_none_told() -> None:
    run = look(data=None, inputs=X, loss=None).measurement.run
    assert (run.basis, run.loss, run.batches) == ("given inputs", None, 1)
    assert run.grad_norm > 0


def test_one_large_batch_is_spread() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(F, H)

        def forward(self, x: Tensor) -> Tensor:
            return self.gru(x.sign())[0][-1].sum() * x.abs().max()

    data = [(X.sign() * size, torch.tensor(0.0)) for size in (1.0, 1.0, 1.0, 50.0)]
    run = look(Scaled(), data=data, loss=lambda output, _: output).measurement.run
    assert run.grad_norm_spread == pytest.approx(50.0, rel=1e-3)


def test_a_loss_that_is_not_finite() -> None:
    data = [(X, Y), (torch.full_like(X, float("nan")), Y)]
    assert look(data=data).measurement.run.nonfinite
    assert not look().measurement.run.nonfinite


def test_a_frozen_model_has_no_gradient_and_still_has_sites() -> None:
    found = look(Net().requires_grad_(False))
    assert found.measurement.run.grad_norm == 0.0
    assert [site.path for site in found.measurement.sites] == ["lstm"]


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda p: SGD(p, lr=0.1), "sgd"),
        (lambda p: Adam(p), "adam"),
        (lambda p: AdamW(p), "adamw"),
        (lambda p: Adam(p, decoupled_weight_decay=True), "adamw"),
        (lambda p: RMSprop(p), "other"),
    ],
)
def test_optimizer_kinds(build: Any, expected: str) -> None:
    assert optimizer_kind(build(Net().parameters())) == expected


def test_what_is_read_of_the_optimizer() -> None:
    model = Net()
    groups = [
        {"params": model.lstm.parameters(), "lr": 0.5, "weight_decay": 0.25},
        {"params": [model.head.weight], "weight_decay": 0.5},
    ]
    optimizer = Adam(groups, lr=0.1, amsgrad=True)
    run = look(model, optimizer).measurement.run
    assert (run.learning_rate, run.weight_decay, run.amsgrad) == (0.5, 0.25, True)
    assert (run.parameters_missing, run.scheduled) == (1, False)
    StepLR(optimizer, 1)
    assert look(model, optimizer).measurement.run.scheduled


def test_a_copy_without_gradient_is_not_missing_in_the_optimizer() -> None:
    both: Any = nn.ModuleDict({"online": Net(), "target": Net()})
    optimizer = Adam(both["online"].lstm.parameters())
    step = {"loss": None, "step": lambda model, batch: _distance(model, batch[0])}
    run = look(both, optimizer, **step).measurement.run
    assert run.parameters_missing == 2
    assert run.missing_names == "`online.head.weight` and `online.head.bias`"


def _distance(model: Any, x: Tensor) -> Any:
    with torch.no_grad():
        aim = model["target"](x)
    return (model["online"](x) - aim).square().mean()


def test_a_stepped_optimizer_means_trained_weights() -> None:
    model = Net()
    optimizer = Adam(model.parameters())
    assert not look(model, optimizer).measurement["lstm"].trained
    model(X).sum().backward()
    optimizer.step()
    assert look(model, optimizer).measurement["lstm"].trained


def test_a_loaded_checkpoint_means_trained_weights() -> None:
    model = Net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    assert look(model).measurement["lstm"].trained


def test_two_looks_are_alike() -> None:
    model = Net()
    first, second = look(model).measurement, look(model).measurement
    assert first.sites == second.sites
    assert first.run.grad_norm == second.run.grad_norm


def test_dropout_is_drawn_alike() -> None:
    class Dropped(Net):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(super().forward(x), 0.5)

    model = Dropped()
    assert look(model).measurement.run.loss == look(model).measurement.run.loss


def test_a_site_by_its_path() -> None:
    found = look().measurement
    assert "lstm" in found and "gru" not in found
    with pytest.raises(KeyError, match=r"'lst' is not a site; did you mean 'lstm'\?"):
        found["lst"]


def test_cells_in_a_plain_list_are_told() -> None:
    class Forgotten(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells = [nn.GRUCell(F, H)]
            self.head = nn.Linear(H, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.cells[0](x[0]))

    found = look(Forgotten())
    assert found.sites == ()
    assert [place.rpartition(":")[0] for place in found.unregistered] == [__file__]


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_guess_fits_the_model(batch_first: bool) -> None:
    found = guessed_batches(Net(batch_first), None, 0)
    (batch,) = found.batches
    assert found.basis == "inferred inputs"
    assert batch.args[0].shape == ((8, 64, F) if batch_first else (64, 8, F))


def test_a_guess_is_as_long_as_the_memory() -> None:
    assert guessed_batches(Net(), 200, 0).batches[0].args[0].shape == (200, 8, F)


def test_the_second_guess_is_taken_when_the_first_fails() -> None:
    class Turned(Net):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] != 8:
                raise ValueError("batch first, please")
            return super().forward(x.transpose(0, 1))

    assert guessed_batches(Turned(), None, 0).batches[0].args[0].shape == (8, 64, F)


class Unguessable(nn.Module):
    """Takes what no guess can be; holds a fused module, a time-major one and a cell."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.LSTM(F, H, batch_first=True)
        self.b = nn.GRU(2, H)
        self.c = nn.LSTMCell(5, H)

    def forward(self, graph: Any, nodes: Any) -> Tensor:
        raise NotImplementedError


def test_sites_alone() -> None:
    model = Unguessable()
    batches = guessed_batches(model, None, 0)
    assert batches.basis == "site alone"
    found = measure(Subject(model, None, batches, None, None, 0, guarded=False))
    assert [(s.path, s.steps, s.batch) for s in found.measurement.sites] == [
        ("a", 64, 8),
        ("b", 64, 8),
        ("c", 64, 8),
    ]
    assert {s.memory_source for s in found.measurement.sites} == {"unknown"}
    assert found.measurement.run.grad_norm > 0


def test_a_model_without_recurrences_has_nothing_alone() -> None:
    class Odd(nn.Module):
        def forward(self, graph: Any, nodes: Any) -> Tensor:
            raise NotImplementedError

    assert guessed_batches(Odd(), None, 0).batches == ()


def refusal(model: nn.Module, data: Any, **options: Any) -> str:
    with pytest.raises(RefusedError) as caught:
        check_runs(subject(model, data, **options))
    assert caught.value.__cause__ is not None
    return str(caught.value)


def test_a_batch_that_runs_is_no_refusal() -> None:
    check_runs(subject(Net(), [(X, Y)], loss=nn.CrossEntropyLoss()))


def test_a_wrong_shape() -> None:
    assert refusal(Net(), [(torch.randn(T, B, 7), Y)]) == (
        "`model`: raised RuntimeError: input.size(-1) must be equal to input_size. Expected 3, "
        "got 7, on float32[6, 5, 7]. "
        "Give what it takes; `lstm` takes (T, B, F) with F = 3. (RG912)"
    )


def test_a_wrong_dtype() -> None:
    model = nn.Sequential(nn.Embedding(9, F), Net())
    assert refusal(model, [(torch.rand(T, B), Y)]) == (
        "`model`: raised RuntimeError: Expected tensor for argument #1 'indices' to have one of "
        "the following scalar types: Long, Int; but got FloatTensor instead (while checking "
        "arguments for embedding), on float32[6, 5]. "
        "Give what it takes; `0` is an Embedding of 9 and takes integer ids. (RG912)"
    )


def test_a_wrong_target() -> None:
    said = refusal(Net(), [(X, Y[:3])], loss=nn.CrossEntropyLoss())
    assert said.startswith("`loss`: raised ValueError: Expected input batch_size (5) to match")


def test_a_step_that_fails() -> None:
    def step(model: nn.Module, batch: Any) -> Tensor:
        raise KeyError("labels")

    said = refusal(Net(), [{"x": X}], step=step)
    assert said.startswith("`step`: raised KeyError: 'labels', on float32[6, 5, 3]. ")


def test_the_words_of_a_cell_and_of_no_recurrence() -> None:
    cell = refusal(nn.Sequential(nn.GRUCell(F, H)), [(torch.randn(B, 7), Y)])
    assert "Give what it takes; `0` takes (B, F) with F = 3. (RG912)" in cell
    plain = refusal(nn.Sequential(nn.Linear(F, H)), [(torch.randn(B, 7), Y)])
    assert "Give what it takes; see the model's forward. (RG912)" in plain


def test_the_first_value_that_is_not_finite_has_its_place() -> None:
    class Rooted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.GRU(5, 16, batch_first=True), nn.Linear(16, 1)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(self.rnn(x)[0][:, -1])
            return (logits - 9).sqrt()

    x, y = torch.randn(6, 20, 5), torch.rand(6, 1)
    run = measure(subject(Rooted(), [(x, y)] * 2, loss=nn.MSELoss())).measurement.run
    assert run.nonfinite and "batch 0: forward `(model)` at sqrt" in str(run.first_nonfinite)
    assert run.places["nonfinite"].startswith("tests/test_measurement.py:")
    calm = measure(subject(nn.GRU(5, 16), [x])).measurement.run
    assert calm.first_nonfinite is None and calm.places == {}
