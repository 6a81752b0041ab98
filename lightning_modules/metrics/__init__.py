"""Metrics whose states are sums over distinct rows."""
