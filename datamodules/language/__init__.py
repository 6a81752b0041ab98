"""Tokenizers, prompts and texts."""
