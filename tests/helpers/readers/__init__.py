"""Every reader of files that a user, or a stranger, may give: whole files to begin with, and how they are read."""

from readers import editing, graphs, preference, recommendation, runs, weights
from readers.registry import READERS, copy

__all__ = ["READERS", "copy", "editing", "graphs", "preference", "recommendation", "runs", "weights"]
