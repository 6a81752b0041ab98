"""Sources of interactions."""
