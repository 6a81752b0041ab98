"""Patches: small, reversible changes of a model's weights, kept as files and in checkpoints."""
