"""Pure tensor mathematics: log-probabilities, tries, decoding, grounding."""
