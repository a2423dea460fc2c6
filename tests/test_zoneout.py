"""Zoneout: a mask per step in training, the expectation outside of it, torch's own at 0."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cell_cases import (
    BATCH,
    CELLS,
    DEEP,
    F64,
    FORMS,
    HIDDEN,
    IN,
    STEPS,
    assert_is_torchs,
    build,
    close,
    initial,
    ragged,
    states_of,
    with_weights_of,
)
from torch import nn

from rnnguard.nn import ZoneoutGRU, ZoneoutLSTM
from rnnguard.nn.zoneout import ZONEOUT_CELLS, Zoneout

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported")

every_cell = pytest.mark.parametrize("name", [name for name in CELLS if "zoneout" in name])


def zoned(name: str, hidden: float, cell: float | None = None, **form: Any) -> nn.RNNBase:
    options = {"zoneout_hidden": hidden, **form}
    if name.endswith("lstm"):
        options["zoneout_cell"] = hidden if cell is None else cell
    return build(name, **options)


@every_cell
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("training", [False, True])
def test_at_0_it_is_torchs(name: str, form: str, training: bool) -> None:
    module = zoned(name, 0.0, **FORMS[form]).train(training)
    assert_is_torchs(module, with_weights_of(module))


def test_at_0_a_projected_one_is_torchs() -> None:
    module = zoned("zoneout lstm", 0.0, proj_size=2, **DEEP)
    assert_is_torchs(module, with_weights_of(module))


@every_cell
@pytest.mark.parametrize("training", [False, True])
def test_at_1_nothing_ever_changes(name: str, training: bool) -> None:
    module = zoned(name, 1.0, **DEEP).train(training)
    hx = initial(module, BATCH)
    for x in (torch.randn(STEPS, BATCH, IN, dtype=F64), ragged()[1]):
        _, state = module(x, hx)
        for mine, given in zip(states_of(state), states_of(hx), strict=True):
            assert torch.equal(mine, given)


@every_cell
def test_outside_of_training_each_step_is_the_expectation(name: str) -> None:
    module = zoned(name, 0.3, 0.6)
    plain = with_weights_of(module)
    x, state = torch.randn(STEPS, BATCH, IN, dtype=F64), initial(module, BATCH)
    found, last = module(x, state)
    shares = (0.3, 0.6)
    for now, mine in zip(x, found, strict=True):
        new = states_of(plain(now[None], state)[1])
        pairs = zip(shares, states_of(state), new, strict=False)
        mixed = tuple(p * old + (1 - p) * fresh for p, old, fresh in pairs)
        state = mixed if isinstance(state, tuple) else mixed[0]
        close(mine, mixed[0][0])
    close(last, state)


@every_cell
def test_in_training_units_keep_their_state_as_often_as_asked(name: str) -> None:
    cls = CELLS[name]
    module = cls(IN, 50, zoneout_hidden=0.3).train()
    x = torch.randn(100, 20, IN)
    with torch.no_grad():
        output, _ = module(x)
        kept = (output[1:] == output[:-1]).double()
    assert float(kept.mean()) == pytest.approx(0.3, abs=0.01)
    # Drawn anew for each step, sequence and unit: no row or column is kept as a whole.
    for dims in ((0,), (1,), (2,)):
        assert 0 < float(kept.mean(dims).std()) < 0.25
    assert not torch.equal(output, module(x)[0])


def test_output_and_cell_have_masks_of_their_own() -> None:
    module = ZoneoutLSTM(IN, 40, zoneout_hidden=0.0, zoneout_cell=1.0).train()
    hx = torch.randn(1, 3, 40), torch.randn(1, 3, 40)
    output, (_, c) = module(torch.randn(6, 3, IN), hx)
    assert torch.equal(c, hx[1])
    assert not bool((output[1:] == output[:-1]).any())


def test_forward_and_backward_see_one_mask() -> None:
    """What a step kept has no gradient from that step's input."""
    module = ZoneoutGRU(IN, 8, zoneout_hidden=0.5, dtype=F64).train()
    x = torch.randn(1, 1, IN, dtype=F64, requires_grad=True)
    h = torch.randn(1, 1, 8, dtype=F64)
    output, _ = module(x, h)
    kept = (output == h)[0, 0]
    assert 0 < int(kept.sum()) < 8
    for unit in range(8):
        (gradient,) = torch.autograd.grad(output[0, 0, unit], x, retain_graph=True)
        assert bool(gradient.any()) != bool(kept[unit])


def test_masks_are_drawn_from_torchs_seed() -> None:
    module, x = ZoneoutGRU(IN, HIDDEN).train(), torch.randn(STEPS, BATCH, IN)
    torch.manual_seed(3)
    first = module(x)[0]
    torch.manual_seed(3)
    assert torch.equal(module(x)[0], first)


def test_probabilities_are_checked_and_told() -> None:
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            ZoneoutGRU(IN, HIDDEN, zoneout_hidden=wrong)
        with pytest.raises(ValueError, match="cell"):
            Zoneout(0.5, wrong)
    assert "hidden=0.05, cell=0.5" in repr(ZoneoutLSTM(IN, HIDDEN))
    for plain, cls in ZONEOUT_CELLS.items():
        assert issubclass(cls, plain)
