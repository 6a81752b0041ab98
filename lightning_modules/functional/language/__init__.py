"""Passes, log-probabilities and decoding of language models."""
