"""Sequence encoders, cross-entropy over items, draws of negatives, counting baselines, and hashes of rows.

Files:
    baselines.py: Popularity, item neighbours and item transitions.
    ease.py: Weights of EASE.
    sequence_encoders.py: SASRec, BERT4Rec and GRU4Rec.
    hstu.py: HSTU.
    sequence_layout.py: Positions and attention masks of padded and packed rows.
    item_softmax.py: Cross-entropy over all items in chunks.
    item_draws.py: Negative items, and lookup of earlier items.
    row_hash.py: Order-independent hash of a set of rows.
"""
