"""Counting baselines and hashes of recommendation rows.

Files:
    baselines.py: Popularity, item neighbours and item transitions.
    row_hash.py: Order-independent hash of a set of rows.
"""
