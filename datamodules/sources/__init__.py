"""Sources of recommendation data: one file per public source or format."""

from malleable.datamodules.sources.base import InteractionTables, ReadyRow, ReadyRows, Source
from malleable.datamodules.sources.candidates import CandidateRows
from malleable.datamodules.sources.instruction import InstructionRows
from malleable.datamodules.sources.movielens import MovieLens
from malleable.datamodules.sources.synthetic import Synthetic
from malleable.datamodules.sources.tables import Tables

__all__ = ["CandidateRows", "InstructionRows", "InteractionTables", "MovieLens", "ReadyRow", "ReadyRows", "Source", "Synthetic", "Tables"]
