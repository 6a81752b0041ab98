"""Sources of edit requests and texts."""
