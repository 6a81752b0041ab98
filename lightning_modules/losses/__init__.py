"""Losses as modules on tensors, independent of models, tokenizers and the Trainer."""
