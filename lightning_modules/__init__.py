"""LightningModules: one class per method."""

from malleable.lazy import attach

__getattr__, __dir__, __all__ = attach(__name__, __file__)
