"""The methods that an ablation can compare, each a short declaration."""
