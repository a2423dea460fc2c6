"""One layer in one direction: the only part of a cell that a faster rung may replace.

Rung 0 is a plain differentiable loop in any dtype. Rung 1 is one autograd.Function whose
backward is derived by hand: what depends on the forward alone is computed for many steps at
once, and the few products that are left run from step to step.
"""
