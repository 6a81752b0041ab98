"""Modules. ``__init__.pyi`` lists the public names, which are imported on first use.

Files:
    recommendation/: Recommenders.
    graphs/: Knowledge-graph embeddings.
    language/: Language models.
    editing/: Edits of language models.
    search/: Embeddings of texts, and search for items.
    functional/: Functions on tensors.
    losses/: Losses.
    metrics/: Metrics.
    patches/: Reversible changes of weights.
    base.py: Base class of modules: steps, logging, optimizer, checkpoints.
    distributed_rows.py: Marks of rows that samplers repeat, so that they are counted once.
    synchronized_logging.py: Logging of values that are the same on all ranks.
    trained.py: Loading of modules of earlier runs.
    stored_weights.py: Checks of checkpoints.
    verified_file.py: Safetensors files with a checksum.
    serialization.py: Conversion of settings to plain data.
    fsdp.py: FSDP2 strategy.
    frozen_ddp.py: DDP without trainable parameters.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
