"""Adapters that other programs load without RankFlow."""
