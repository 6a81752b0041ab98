"""Commands that do not train: ``compare``, ``patch`` and ``recipes``."""
