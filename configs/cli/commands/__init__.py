"""Commands without a Trainer: ``compare``, ``patch`` and ``recipes``."""
