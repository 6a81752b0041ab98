"""Recommendation data."""
