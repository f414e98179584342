"""Ablations: every method at equal parameters, with honest statistics."""
