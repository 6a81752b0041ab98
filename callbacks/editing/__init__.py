"""Edits after training."""
