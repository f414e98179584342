"""Declarative TOML files and the validated frozen models that they become."""
