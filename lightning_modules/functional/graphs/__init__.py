"""Score functions, losses and relation patterns of knowledge-graph embeddings."""
