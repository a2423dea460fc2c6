"""Verdicts at initialisation against training outcomes: rnnguard beside its peers' rules."""
