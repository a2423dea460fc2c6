"""Parameters that no gradient reaches, and those that only seem so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from factories import recorded, subject
from torch import Tensor, nn

from rnnguard.inspection.sites import find_sites
from rnnguard.probe.gradients import gradient_norms
from rnnguard.probe.idle import feeding, idle_parameters, in_words
from rnnguard.probe.snapshot import fingerprint, untouched

B, T, F, H = 6, 11, 5, 8
X, Y, CE = torch.randn(B, T, F), torch.randint(3, (B,)), nn.CrossEntropyLoss()


class Net(nn.Module):
    def __init__(self, read: Callable[..., Any] | None = None, **more: nn.Module) -> None:
        super().__init__()
        self.rnn, self.head = nn.GRU(F, H, batch_first=True), nn.Linear(H, 3)
        self.more, self.read = nn.ModuleDict(more), read

    def forward(self, x: Tensor) -> Any:
        out = self.rnn(x)[0][:, -1]
        return self.head(out if self.read is None else self.read(self, out))


def idle(model: nn.Module, data: Any = None, *, explained: Any = (), **options: Any) -> Any:
    asked = subject(model, data or [(X, Y)] * 3, **(options or {"loss": CE}))
    before = fingerprint(model)
    with untouched(model):
        gradients = gradient_norms(model, asked.batches, 0)
        found = idle_parameters(asked, gradients, explained)
    assert fingerprint(model) == before
    return found


UNUSED = ("more.old.weight", "more.old.bias")


@pytest.mark.parametrize("options", [{"loss": CE}, {"loss": None}])
def test_a_layer_that_is_never_used(options: Any) -> None:
    assert idle(Net(old=nn.Linear(H, 3)), **options) == UNUSED


def test_what_the_optimizer_does_not_hold_is_left_out_on_purpose() -> None:
    model = Net(old=nn.Linear(H, 3))
    for parameters, expected in [(model.parameters(), UNUSED), (model.head.parameters(), ())]:
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        assert idle(model, loss=CE, optimizer=optimizer) == expected


def test_with_the_users_own_step() -> None:
    def step(model: nn.Module, batch: Any) -> Any:
        return CE(model(batch[0]), batch[1])

    assert idle(Net(old=nn.Linear(H, 3)), step=step) == UNUSED


@pytest.mark.parametrize(
    "read",
    [
        lambda net, h: net.more["old"](h).detach() + h,
        lambda net, h: 0 * net.more["old"](h) + h,
        lambda net, h: torch.relu(net.more["old"](h) - 1e6) + h,
    ],
)
def test_a_layer_without_effect(read: Callable[..., Any]) -> None:
    assert idle(Net(read, old=nn.Linear(H, H))) == UNUSED


def test_a_parameter_of_its_own() -> None:
    model = Net()
    model.scale = nn.Parameter(torch.ones(H))
    assert idle(model) == ("scale",)
    assert idle(model, explained={"scale"}) == ()


def zero_start() -> nn.Module:
    out = nn.Linear(H, H)
    nn.init.zeros_(out.weight)
    nn.init.zeros_(out.bias)
    return out


SOUND: dict[str, Callable[[], nn.Module]] = {
    "plain": Net,
    "frozen": lambda: Net(old=nn.Linear(H, 3).requires_grad_(False)),
    "tied": lambda: tied(),
    "a branch that starts at zero": lambda: Net(
        lambda net, h: h + net.more["out"](torch.relu(net.more["inner"](h))),
        inner=nn.Linear(H, H),
        out=zero_start(),
    ),
    "both ways, last step": lambda: BothWays(),
    "an energy, of which the slope counts": lambda: Net(
        lambda net, h: torch.autograd.grad(
            net.more["energy"](h).square().sum(), h, create_graph=True
        )[0],
        energy=nn.Linear(H, 1),
    ),
    "one step from zero": lambda: Net(
        lambda net, h: net.more["next"](h[:, None])[0][:, 0],
        next=nn.GRU(H, H, batch_first=True),
    ),
    "attention": lambda: Net(
        lambda net, h: (net.more["score"](h).softmax(0) * h).sum(0, keepdim=True).expand_as(h),
        score=nn.Linear(H, 1),
    ),
}


def tied() -> nn.Module:
    model = Net(lambda net, h: net.more["second"](h), second=nn.Linear(H, H))
    model.more["second"].weight = nn.Parameter(torch.randn(H, H))
    model.more["third"] = nn.Module()
    model.more["third"].weight = model.more["second"].weight
    return model


class BothWays(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(F, H, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * H, 3)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.rnn(x)[0][:, -1])


@pytest.mark.parametrize("name", SOUND)
def test_sound_models(name: str) -> None:
    assert idle(SOUND[name]()) == ()


def test_what_only_some_batches_use() -> None:
    class Speakers(Net):
        def forward(self, x: Any) -> Any:
            h, who = self.rnn(x[0])[0][:, -1], int(x[1][0])
            return self.head(h + self.more[str(who)].weight)

    def pair(who: int) -> Any:
        return (X, torch.tensor([who])), Y

    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(H))

    model = Speakers(**{"0": Held(), "1": Held(), "2": Held()})
    data = [([a, b], y) for (a, b), y in (pair(0), pair(1), pair(0))]
    step = lambda m, batch: CE(m(batch[0]), batch[1])  # noqa: E731
    assert idle(model, data, step=step) == ("more.2.weight",)


class Crf(Net):
    def __init__(self) -> None:
        super().__init__()
        self.transitions = nn.Parameter(torch.randn(3, 3))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.transitions)

    def negative_log_likelihood(self, x: Tensor, y: Tensor) -> Any:
        return self(x)[y].sum() + self.transitions.sum()


def test_what_another_method_uses_without_a_loss() -> None:
    assert idle(Crf(), loss=None) == ()
    assert idle(Crf()) == ("transitions",)

    class Reset(Net):
        def __init__(self) -> None:
            super().__init__(old=nn.Linear(H, 3))

        def reset_parameters(self) -> None:
            self.more["old"].apply(lambda _: None)

    assert idle(Reset(), loss=None) == UNUSED


def test_what_stands_before_a_call() -> None:
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.rnn = nn.Linear(F, F), nn.LSTM(F, H, batch_first=True)
            self.head = nn.Linear(H, 3)

        def forward(self, x: Tensor) -> Any:
            return self.head(self.rnn(self.embed(x))[0][:, -1].detach())

    model = Cut()
    recording = recorded(model, X)
    (site,) = find_sites(model, recording)
    before = {n for n, _ in model.named_parameters() if not n.startswith("head")}
    assert feeding(recording.graph, site.calls) == before
    assert set(idle(model)) == before
    assert idle(model, explained=before) == ()


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, ""),
        (1, "`a`"),
        (2, "`a` and `b`"),
        (4, "`a`, `b`, `c` and `d`"),
        (6, "`a`, `b`, `c` and 3 more"),
    ],
)
def test_names_in_words(count: int, words: str) -> None:
    assert in_words("abcdef"[:count]) == words
