"""Knowledge-graph data."""
