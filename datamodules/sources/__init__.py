"""Sources of recommendation data: one file per public source or format."""

from malleable.datamodules.sources.base import InteractionTables, ReadyRow, ReadyRows, Source
from malleable.datamodules.sources.movielens import MovieLens

__all__ = ["InteractionTables", "MovieLens", "ReadyRow", "ReadyRows", "Source"]
