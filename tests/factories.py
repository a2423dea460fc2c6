"""Sites found in a model, and readings made by hand that one test changes in one place."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rnnguard.inspection.batches import given_batches
from rnnguard.inspection.gates import cell_of, weights_of
from rnnguard.inspection.recording import Recording, record
from rnnguard.inspection.sites import FoundSite, find_sites
from rnnguard.measurements import Exponent, Measurement, RunReadings, SiteReadings
from rnnguard.probe.steps import Trajectory, run
from rnnguard.probe.subject import Subject


def recorded(model: nn.Module, *args: Any, **kwargs: Any) -> Recording:
    return record(lambda: model(*args, **kwargs), model, (args, kwargs))


def sites_in(model: nn.Module, *args: Any, **kwargs: Any) -> list[FoundSite]:
    return find_sites(model, recorded(model, *args, **kwargs))


def only_site(model: nn.Module, *args: Any, **kwargs: Any) -> FoundSite:
    (found,) = sites_in(model, *args, **kwargs)
    return found


def zeroed(module: nn.Module) -> nn.Module:
    """The module with every parameter 0."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    return module


def first_layer(
    module: nn.Module, x: Tensor, *state: Tensor, lengths: list[int] | None = None
) -> Trajectory:
    """The first layer over x (T, B, F), from zero where no state (B, n) is given."""
    cell = cell_of(module)
    assert cell is not None
    weights = weights_of(module, 0, "forward")
    steps, batch = x.shape[:2]
    sizes = [weights.hh.shape[1], *([weights.hidden_size] if cell == "lstm" else [])]
    initial = state or tuple(x.new_zeros(batch, size) for size in sizes)
    ends = torch.tensor(lengths or [steps] * batch)
    with torch.no_grad():
        return run(cell, weights, x, initial, ends)


def subject(
    model: nn.Module, data: Any, optimizer: Optimizer | None = None, **options: Any
) -> Subject:
    """The model on the data, with loss= or step= where given; 5 steps of memory declared."""
    known: dict[str, Any] = {"inputs": None, "loss": None, "step": None}
    given = {name: options.pop(name, value) for name, value in known.items()}
    batches = given_batches(model, data, **given, count=8)
    assert batches is not None
    fields: dict[str, Any] = {"memory": 5, "total_steps": None, "seed": 0, "guarded": False}
    return Subject(model, optimizer, batches, **fields | options)


def site_readings(**fields: Any) -> SiteReadings:
    """A healthy LSTM over 100 steps that needs them all, unless the fields say otherwise."""
    known: dict[str, Any] = {
        "path": "lstm",
        "location": "model.py:18",
        "cell": "lstm",
        "bidirectional": False,
        "layers": 1,
        "hidden_size": 32,
        "proj_size": 0,
        "bias": True,
        "dropout": 0.0,
        "steps": 100,
        "window": 100,
        "batch": 8,
        "packed": False,
        "readout": "final_state",
        "normalized": False,
        "residual": False,
        "exponents": (Exponent(value=math.log(0.99), stderr=0.001),),
        "retention": (0.0, -1.0),
        "layer_readings": (),
        "decay_per_step": 0.99,
        "expansive": False,
        "growth": 1.0,
        "growth_over_window": -1.0,
        "effective_length": 100,
        "memory_needed": 100,
        "memory_source": "declared",
        "lag_concentration": None,
        "retention_at_memory": -0.5,
        "spectral_radius": 0.6,
        "whole_matrix_orthogonal": False,
        "forget_gate": 0.9,
        "forget_bias": 2.0,
        "forget_bias_doubled": False,
        "saturation": 0.1,
        "dead_units": None,
        "input_rms": 1.0,
        "input_drive": 0.6,
        "output_rms": 0.2,
        "silent_input": False,
        "keep_gate": True,
        "trained": False,
        "level": "healthy",
    }
    return SiteReadings(**known | fields)


def run_readings(**fields: Any) -> RunReadings:
    """Calm gradients on real data under a guarded Adam, unless the fields say otherwise."""
    known: dict[str, Any] = {
        "basis": "real data",
        "batches": 4,
        "loss": 1.4,
        "grad_norm": 2.0,
        "grad_norm_spread": 1.5,
        "nonfinite": False,
        "precision": "fp32",
        "device": "cpu",
        "optimizer": "adam",
        "learning_rate": 1e-3,
        "weight_decay": 0.0,
        "amsgrad": False,
        "guarded": True,
        "scheduled": False,
        "parameters_missing": 0,
        "batches_per_epoch": 100,
        "total_steps": 1000,
        "seed": 0,
        "seconds": 0.1,
        "torch": "2.13.0",
    }
    return RunReadings(**known | fields)


def measurement(*sites: SiteReadings, **run: Any) -> Measurement:
    return Measurement(run=run_readings(**run), sites=sites)
