"""Counting baselines and digests of recommendation rows."""
