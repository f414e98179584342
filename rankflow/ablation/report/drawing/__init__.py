"""Figures of an ablation, as matplotlib figures that leave no global state behind."""
