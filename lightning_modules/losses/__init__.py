"""Losses: small modules on tensors, without model, tokenizer or Trainer."""
