"""Edit requests and texts."""
