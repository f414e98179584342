"""Scorers: what every component is worth, tracked on the device while training."""
