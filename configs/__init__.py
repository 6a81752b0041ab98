"""Recipes: YAML files that travel with the package."""
