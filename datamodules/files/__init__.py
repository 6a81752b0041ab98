"""Reading, caching and writing files."""
