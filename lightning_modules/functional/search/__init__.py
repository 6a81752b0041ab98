"""Search in embeddings.

Files:
    nearest.py: Exact search for the nearest vectors.
    vector_space.py: Vectors to search: their scores, and bounds of the rounding errors of matrix products.
"""
