"""Healthy models of realistic shape, each with data, an optimizer and a whole training step.

Written with torch alone, as for projects of their own. Every module offers `build()`, `batches()`,
`step(model, batch)` for the loss, `optimizer(model)`, `train_step(model, optimizer, batch)` and
`MEMORY`: the steps back that its author would declare, or None.
"""
