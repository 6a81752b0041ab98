"""Scores and flows of knowledge-graph embeddings."""
