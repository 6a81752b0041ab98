"""Functions on tensors: log-probabilities, decoding, grounding, graph embeddings and edits."""
