"""Sources of knowledge graphs."""
