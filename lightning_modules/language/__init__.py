"""Language models: configuration, weights, decoding."""
