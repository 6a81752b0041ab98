"""Algebra and text statistics of model editing."""
