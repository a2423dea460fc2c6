"""Weights that lie in memory as torch's kernels want them, and modes that they do not want."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from factories import recorded
from torch import Tensor, nn
from torch.nn.functional import dropout
from torch.nn.utils import parametrizations

from rnnguard.inspection.kernel_layout import is_contiguous, is_one_chunk, refuses_backward

F, H = 3, 4


@pytest.mark.parametrize(
    "module",
    [
        nn.RNN(F, H),
        nn.GRU(F, H, num_layers=2, bidirectional=True),
        nn.LSTM(F, H, bias=False),
        nn.LSTMCell(F, H),
        nn.GRU(F, H).double(),
        copy.deepcopy(nn.LSTM(F, H)),
    ],
    ids=["rnn", "gru", "no bias", "cell", "double", "copy"],
)
def test_as_torch_makes_them(module: nn.Module) -> None:
    assert is_contiguous(module)


def test_a_loaded_module() -> None:
    file = io.BytesIO()
    torch.save(nn.GRU(F, H), file)
    file.seek(0)
    assert is_contiguous(torch.load(file, weights_only=False))


@pytest.mark.parametrize("module", [nn.RNN(H, H), nn.RNNCell(H, H)], ids=["fused", "cell"])
def test_a_turned_weight(module: nn.Module) -> None:
    name = next(name for name, _ in module.named_parameters() if "weight_hh" in name)
    weight = getattr(module, name)
    weight.data = weight.data.T
    assert not is_contiguous(module)
    weight.data = weight.data.contiguous()
    assert is_contiguous(module)


def test_what_the_kernel_holds_is_no_longer_the_parameter() -> None:
    module = nn.GRU(F, H)
    module._flat_weights[1] = torch.randn(3 * H, H)
    assert not is_contiguous(module)
    module._init_flat_weights()
    assert is_contiguous(module)


def test_weights_made_anew_are_no_fault() -> None:
    module = nn.GRU(F, H)
    parametrizations.orthogonal(module, "weight_hh_l0")
    module(torch.randn(5, 2, F))
    assert is_contiguous(module)


class Dropped(nn.Module):
    """Drops recurrent weights, as many wrappers do."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(F, H)
        self.raw = nn.Parameter(torch.randn(3 * H, H))
        del self.rnn._parameters["weight_hh_l0"]
        self.rnn.weight_hh_l0 = self.raw * 1

    def forward(self, x: Tensor) -> Tensor:
        self.rnn.weight_hh_l0 = dropout(self.raw, 0.5, self.training)
        out: Tensor = self.rnn(x)[0]
        return out


def test_dropped_weights_are_no_fault_on_the_cpu() -> None:
    model = Dropped()
    (call,) = recorded(model, torch.randn(5, 2, F)).calls
    assert is_contiguous(model.rnn, call.weights)


def test_what_the_call_was_given_counts() -> None:
    module = nn.RNN(F, H)
    given = [weight.detach() for weight in module.parameters()]
    given[1] = given[1].T
    assert not is_contiguous(module, given)


def test_one_chunk() -> None:
    whole = torch.randn(H * F + H * H)
    parts = [whole[: H * F].view(H, F), whole[H * F :].view(H, H)]
    assert is_one_chunk(parts)
    assert not is_one_chunk([parts[0], parts[1].clone()])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_a_replaced_weight_breaks_the_chunk() -> None:
    module = nn.GRU(F, H).cuda()
    assert is_contiguous(module)
    for weight in module.parameters():
        weight.data = weight.data.clone()
    assert not is_contiguous(module)
    module.flatten_parameters()
    assert is_contiguous(module)


def test_a_fused_recurrence_in_eval_mode_that_is_to_be_trained() -> None:
    assert refuses_backward(nn.LSTM(F, H).eval(), "cuda")
    assert not refuses_backward(nn.LSTM(F, H).eval(), "cpu")
    assert not refuses_backward(nn.LSTM(F, H), "cuda")
    assert not refuses_backward(nn.LSTM(F, H).eval().requires_grad_(False), "cuda")
    assert not refuses_backward(nn.LSTMCell(F, H).eval(), "cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cudnn_does_refuse() -> None:
    module = nn.LSTM(F, H).cuda().eval()
    out, _ = module(torch.randn(5, 2, F, device="cuda"))
    with pytest.raises(RuntimeError, match="training mode"):
        out.sum().backward()
