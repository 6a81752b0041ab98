"""Embeddings of texts, and search for items.

Files:
    item_index.py: Index of items for exact search (ItemIndex).
    text_encoder.py: Embeddings of texts by a pretrained encoder (TextEncoder).
"""
