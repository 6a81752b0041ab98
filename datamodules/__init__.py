"""Data modules and batches. ``__init__.pyi`` lists the public names, which are imported on first use.

Files:
    recommendation/: Interactions, prompts and rows of recommendation.
    graphs/: Triples and queries of knowledge graphs.
    editing/: Edit requests.
    preference/: Prompts with chosen and rejected answers.
    language/: Tokenizers and texts.
    sources/: Sources of data: one file for each source or format.
    files/: Reading, writing, downloading and caching of files.
    base.py: Base class of data modules.
    batch.py: Typed batches, catalogue, vocabulary and graph labels.
    record.py: Records whose tensors keep their dtype; base of batches.
    collate.py: Collation of rows to batches.
    padding.py: Padding of ragged rows.
    loading.py: Loader with global batches and exact resumption.
    global_batches.py: Sampler of global batches.
    row_reader.py: Reading of rows with worker processes.
    sample_ids.py: Ids and orders that depend on the content of rows.
    negative_samplers.py: Samplers of rejected items, for recommenders.
    compatibility.py: Checks that data have the tokenizer, template and items of a checkpoint.
    stored_identity.py: Storage of tokenizer, template and items in checkpoints and exported folders.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
