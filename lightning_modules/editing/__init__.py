"""Editing facts in the weights of a language model, in plain torch: where, towards what, and by how much."""
