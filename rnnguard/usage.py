"""What the model's code and its training step do with a recurrence, as readings; no torch.

Each default says that nothing is wrong, or that nobody looked. `places` holds the user's
file:line by the name of the reading that was made there.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rnnguard.records import Record

StateIndex = Literal["sound", "first layer", "one direction", "mixed axes"]
ClipOrder = Literal["none", "sound", "after the step", "before backward"]
ClipUse = Literal["none", "sound", "not positive", "never", "always"]
Places = dict[str, str]


class SiteUsage(Record):
    """How the model's code uses one site.

    `state_index`: which part of the final state is taken, where layers or directions lie on
    one axis. `reverse_seen`: steps that the last reverse state which is read has seen.
    `detached`: values flow from the site to the output, gradient does not. `behind_padding`:
    whether the state behind padding is read, as seen in the graph, or measured by letting the
    padding grow. `resettable`: whether any code can reset the state that is carried over.
    `bypassed_weights`: weights that may change without the output changing. `contiguous`:
    its weights lie in memory as the kernel wants them. `reach_share`: `forward_reach` over the
    memory needed, where that is known.
    """

    places: Places = Field(default={})
    state_index: StateIndex = "sound"
    reverse_seen: int | None = None
    detached: bool = False
    behind_padding: Literal["no", "seen", "measured"] = "no"
    resettable: bool | None = None
    bypassed_weights: int = 0
    bypassed_names: str = ""
    contiguous: bool = True
    eval_mode: bool = False
    reach_share: float | None = None


class RunUsage(Record):
    """How the whole model and its training step use gradient and optimizer.

    `leakage`: share of a sample's input gradient that lies on other samples, `mixed_axis` in
    words where they meet. `parameters_idle`: trainable tensors without any gradient.
    `missing_names`: those that get one and are not in the optimizer. `parameters_foreign`:
    tensors in the optimizer that are not the model's. `detach_unused`: statements that detach
    and drop the result. `graph_retained`: the last backward of a step keeps its graph.

    From watching real training steps, of which there were `watched_steps`: `clip_order`,
    `clip_scaled` (the clip met gradients still multiplied by the loss scale), `clip_norm` (its
    threshold), `clip_use`, `cleared_before_step` (gradients are cleared between backward and
    step), `never_cleared` (each backward adds to the gradients of all steps before),
    `nonfinite_passed` (a gradient that was not finite reached the weights), `fp16_unscaled`
    (half precision without a loss scale).
    """

    places: Places = Field(default={})
    leakage: float | None = None
    mixed_axis: str = ""
    parameters_idle: int = 0
    idle_names: str = ""
    missing_names: str = ""
    parameters_foreign: int = 0
    detach_unused: int = 0
    graph_retained: bool = False
    watched_steps: int = 0
    clip_order: ClipOrder = "none"
    clip_scaled: bool = False
    clip_norm: float | None = None
    clip_use: ClipUse = "none"
    cleared_before_step: bool = False
    never_cleared: bool = False
    nonfinite_passed: bool | None = None
    fp16_unscaled: bool | None = None
