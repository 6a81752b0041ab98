"""Counting baselines and hashes of recommendation rows."""
